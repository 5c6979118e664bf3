#!/usr/bin/env python3
"""The training step of `unisono bench step` in PyTorch, for comparison: the same model, shapes and loss.

    PYTHON scripts/torch_moe.py [--threads 2] [--compile] [--grouped] [--steps 10] [--d-model 256] ...

A decoder-only transformer: RMSNorm, rotary causal attention with grouped KV heads, and in every layer a sigmoid
router with a balance bias, top-k routed SwiGLU experts and a shared one; cross-entropy on an untied head; gradient
accumulation, clipping, AdamW, f32. Tokens are random. Experts run one after the other, as most PyTorch code has
them; --grouped takes torch's grouped product instead, which spares each expert a gradient the size of all experts.
With RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, as torchrun does, processes share the batch: dense gradients
are all-reduced in one buffer, experts are sharded and reached by all-to-all, over gloo.

Rank 0 prints one JSON line: peer, world, tokens_per_s, step_s (median, min, max), peak_rss_mib (its own), loss.
"""
import argparse
import json
import os
import resource
import statistics
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

SIZES = dict(
    vocab=4096, d_model=256, layers=4, heads=4, kv_heads=2, experts=16, top_k=2, shared=1, expert_ff=256, seq=256,
    batch=32, micro=8, steps=10, warmup=3, threads=2,
)
BIAS_RATE, ROPE_THETA, CLIP_NORM = 1e-3, 10_000.0, 1.0
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def parse_sizes():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SIZES.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--compile", action="store_true", help="run the model through torch.compile")
    parser.add_argument("--grouped", action="store_true", help="experts by torch.nn.functional.grouped_mm")
    o = parser.parse_args()
    if o.grouped and not hasattr(F, "grouped_mm"):
        parser.error(f"torch {torch.__version__} has no grouped_mm; leave --grouped out")
    for what, number, divisor in [
        ("--batch by processes", o.batch, WORLD), ("--experts by processes", o.experts, WORLD),
        ("--d-model by --heads", o.d_model, o.heads), ("--heads by --kv-heads", o.heads, o.kv_heads),
    ]:
        if number % divisor:
            parser.error(f"cannot divide {what}: {number} / {divisor}")
    return o


def weight(*shape):
    return nn.Parameter(torch.randn(*shape) * 0.02)


def swiglu(x, w13, w2):
    gate, up = (x @ w13).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ w2


class Exchange(torch.autograd.Function):
    """All-to-all of rows; its gradient is the all-to-all back."""

    @staticmethod
    def forward(ctx, rows, send_counts, receive_counts):
        ctx.counts = send_counts, receive_counts
        return exchange(rows, send_counts, receive_counts)

    @staticmethod
    def backward(ctx, gradient):
        send_counts, receive_counts = ctx.counts
        return exchange(gradient, receive_counts, send_counts), None, None


def exchange(rows, send_counts, receive_counts):
    received = rows.new_empty(sum(receive_counts), rows.shape[1])
    dist.all_to_all_single(received, rows.contiguous(), receive_counts, send_counts)
    return received


class Attention(nn.Module):
    def __init__(self, o):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = o.heads, o.kv_heads, o.d_model // o.heads
        self.wqkv = weight(o.d_model, (o.heads + 2 * o.kv_heads) * self.head_dim)
        self.wo = weight(o.d_model, o.d_model)

    def forward(self, x, cos, sin):
        sequences, length, _ = x.shape
        qkv = (x @ self.wqkv).view(sequences, length, -1, self.head_dim).transpose(1, 2)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        a, b = qk.chunk(2, dim=-1)
        qk = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        q, k = qk.split([self.heads, self.kv_heads], dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).reshape(sequences, length, -1) @ self.wo


class Moe(nn.Module):
    def __init__(self, o):
        super().__init__()
        self.experts, self.top_k, self.local, self.grouped = o.experts, o.top_k, o.experts // WORLD, o.grouped
        mine = slice(RANK * self.local, (RANK + 1) * self.local)
        self.router = weight(o.d_model, o.experts)
        self.register_buffer("bias", torch.zeros(o.experts))
        # Every rank draws all experts and keeps its own: the model does not depend on the number of processes.
        self.w13 = nn.Parameter(weight(o.experts, o.d_model, 2 * o.expert_ff)[mine].detach().clone())
        self.w2 = nn.Parameter(weight(o.experts, o.expert_ff, o.d_model)[mine].detach().clone())
        self.shared = o.shared > 0
        if self.shared:
            self.shared_w13 = weight(o.d_model, 2 * o.shared * o.expert_ff)
            self.shared_w2 = weight(o.shared * o.expert_ff, o.d_model)

    def run_experts(self, rows, counts):
        if self.grouped:
            ends = counts.cumsum(0, dtype=torch.int32)
            gate, up = F.grouped_mm(rows, self.w13, offs=ends).chunk(2, dim=-1)
            return F.grouped_mm(F.silu(gate) * up, self.w2, offs=ends)
        parts = rows.split(counts.tolist())
        return torch.cat([swiglu(part, self.w13[e], self.w2[e]) for e, part in enumerate(parts)])

    def dispatch(self, rows, counts):
        """Rows sorted by expert -> their outputs in the same order; `counts` [ranks, experts]."""
        if WORLD == 1:
            return self.run_experts(rows, counts[0])
        send = counts[RANK].view(WORLD, -1).sum(1).tolist()
        incoming = counts[:, RANK * self.local : (RANK + 1) * self.local]
        receive = incoming.sum(1).tolist()
        arrived = Exchange.apply(rows, send, receive)
        # Rows arrive by (rank, expert); experts want them by (expert, rank).
        expert = torch.arange(self.local).repeat(WORLD).repeat_interleave(incoming.flatten())
        by_expert = expert.argsort(stable=True)
        y = self.run_experts(arrived.index_select(0, by_expert), incoming.sum(0))
        return Exchange.apply(torch.empty_like(y).index_copy(0, by_expert, y), receive, send)

    def forward(self, x):
        shape, x = x.shape, x.flatten(0, 1)
        scores = torch.sigmoid(x @ self.router)
        chosen = (scores + self.bias).topk(self.top_k).indices
        weights = scores.gather(1, chosen)
        weights = weights / weights.sum(1, keepdim=True)

        chosen = chosen.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.experts).view(1, -1)
        if WORLD > 1:
            everyone = counts.new_empty(WORLD, self.experts)
            dist.all_gather_into_tensor(everyone, counts)
            counts = everyone
        with torch.no_grad():
            load = counts.sum(0).float()
            self.bias += BIAS_RATE * torch.sign(load.mean() - load)

        token = order // self.top_k
        y = self.dispatch(x.index_select(0, token), counts) * weights.flatten()[order, None]
        base = swiglu(x, self.shared_w13, self.shared_w2) if self.shared else torch.zeros_like(x)
        return base.index_add(0, token, y).view(shape)


class Block(nn.Module):
    def __init__(self, o):
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(o.d_model, eps=1e-5), Attention(o)
        self.moe_norm, self.moe = nn.RMSNorm(o.d_model, eps=1e-5), Moe(o)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.moe(self.moe_norm(x))


class Model(nn.Module):
    def __init__(self, o):
        super().__init__()
        # Embeddings of unit size keep tokens apart, so that the router spreads them from the first step on.
        self.embedding, self.head = nn.Parameter(torch.randn(o.vocab, o.d_model)), weight(o.vocab, o.d_model)
        self.blocks = nn.ModuleList(Block(o) for _ in range(o.layers))
        self.norm = nn.RMSNorm(o.d_model, eps=1e-5)
        half = o.d_model // o.heads // 2
        angle = torch.outer(torch.arange(o.seq), ROPE_THETA ** (-torch.arange(half) / half))
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, ids, targets):
        x = F.embedding(ids, self.embedding)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(F.linear(self.norm(x), self.head).flatten(0, 1), targets.flatten())


class Trainer:
    def __init__(self, o):
        self.o, self.model = o, Model(o)
        experts = {id(p) for block in self.model.blocks for p in (block.moe.w13, block.moe.w2)}
        self.experts = [p for p in self.model.parameters() if id(p) in experts]
        self.dense = [p for p in self.model.parameters() if id(p) not in experts]
        self.loss = torch.compile(self.model) if o.compile else self.model
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        self.random = torch.Generator().manual_seed(1)

    def batch(self):
        """This rank's sequences of the step's batch, which is the same for any number of processes."""
        ids = torch.randint(0, self.o.vocab, (self.o.batch, self.o.seq + 1), generator=self.random)
        return ids.chunk(WORLD)[RANK]

    def step(self):
        ids = self.batch()
        micros = ids.chunk(max(1, len(ids) // self.o.micro))
        total = 0.0
        for micro in micros:
            loss = self.loss(micro[:, :-1], micro[:, 1:]) * (len(micro) / len(ids))
            loss.backward()
            total += loss.item()
        self.join_gradients()
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def join_gradients(self):
        """Dense gradients: the mean over ranks. Expert gradients hold all ranks' rows already, each of a local mean."""
        if WORLD == 1:
            return
        flat = torch.cat([p.grad.flatten() for p in self.dense])
        dist.all_reduce(flat)
        flat /= WORLD
        for p, gradient in zip(self.dense, flat.split([p.numel() for p in self.dense])):
            p.grad = gradient.view_as(p)
        torch._foreach_div_([p.grad for p in self.experts], WORLD)

    def clip(self):
        """Clips by the norm of the whole model's gradient, wherever an expert lives."""
        def squares(parameters):
            return nn.utils.get_total_norm([p.grad for p in parameters]).square()

        of_experts = squares(self.experts)
        if WORLD > 1:
            dist.all_reduce(of_experts)
        norm = (squares(self.dense) + of_experts).sqrt()
        nn.utils.clip_grads_with_norm_(self.model.parameters(), CLIP_NORM, norm)


def main():
    o = parse_sizes()
    torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    if WORLD > 1:
        dist.init_process_group("gloo")
    trainer = Trainer(o)
    for _ in range(o.warmup):
        trainer.step()
    seconds = []
    for _ in range(o.steps):
        start = time.perf_counter()
        loss = trainer.step()
        seconds.append(time.perf_counter() - start)
    if WORLD > 1:
        mean = torch.tensor(loss / WORLD)
        dist.all_reduce(mean)
        loss = mean.item()
        dist.destroy_process_group()
    if RANK == 0:
        median = statistics.median(seconds)
        print(json.dumps(dict(
            peer=f"torch {torch.__version__}" + (" compile" if o.compile else ""), world=WORLD,
            tokens_per_s=round(o.batch * o.seq / median, 1),
            step_s=dict(median=median, min=min(seconds), max=max(seconds)),
            peak_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, loss=round(loss, 4))))


if __name__ == "__main__":
    main()
