#!/usr/bin/env python3
"""Writes the reference fixtures of the model tests: every tensor of forward and backward, from PyTorch.

    PYTHON scripts/make-fixtures.py            # rewrite crates/model/tests/fixtures
    PYTHON scripts/make-fixtures.py --check    # regenerate into a temporary folder and compare

PYTHON is the interpreter of an environment with torch: `python3 -m venv V && V/bin/pip install torch`.

The model is written here from its formulas and shares nothing with the Rust code but the names of tensors and of
configuration fields; single kernels at longer lengths are PyTorch's own. Parameters are drawn as f32 values; the model runs in f64 with autograd and its tensors are
rounded to f32 once, so a reader's f32 arithmetic is the only error that a comparison sees. A second run in f32
says how large that error is for PyTorch itself. Files are byte-identical on one machine; between machines the last bit
of a rounded f64 may differ, which --check allows for.
"""
import argparse
import json
import math
import pathlib
import random
import struct
import sys
import tempfile

try:
    import torch
except ImportError:
    sys.exit("torch is missing: python3 -m venv V && V/bin/pip install torch, then run V/bin/python " + sys.argv[0])

FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "crates" / "model" / "tests" / "fixtures"
IGNORE = 2**32 - 1
# Least distance between what the router chose and what it did not: far above f32 rounding, so every
# implementation makes the same choice.
ROUTING_GAP = 1e-3
CHECK_TOLERANCE = 1e-6

DEFAULTS = dict(
    vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
    intermediate_size=20, moe_intermediate_size=8, num_experts=8, top_k=2, num_shared_experts=1, first_dense=0,
    num_groups=1, top_groups=1, score_function="sigmoid", normalize_top_k=True, routed_scaling_factor=1.0,
    balance_loss_coef=0.0, z_loss_coef=0.0, qk_norm=False, tie_embeddings=False, rope_theta=10000.0,
    rms_norm_eps=1e-5, sequence_length=12,
)


def case(sequences, documents, ignored, bias=None, **config):
    """`documents`: probability that a position begins a document; `ignored`: that a target is masked;
    `bias`: values of the routing bias that are set by hand, {expert: value}; the others are drawn."""
    return dict(sequences=sequences, documents=documents, ignored=ignored, bias=bias or {}, config=DEFAULTS | config)


CASES = {
    # Everything on. Query width (32) differs from the model's width (24); groups hold three experts, so that the sum of
    # a group's two best is neither its sum nor its maximum.
    "full": case(
        2, 0.15, 0.2, hidden_size=24, num_hidden_layers=3, head_dim=8, intermediate_size=40, num_experts=12, top_k=3,
        first_dense=1, num_groups=4, top_groups=2, routed_scaling_factor=2.5, balance_loss_coef=0.05,
        z_loss_coef=0.01, qk_norm=True, sequence_length=16),
    "softmax_tied": case(
        3, 0.1, 0.0, vocab_size=50, num_key_value_heads=4, num_shared_experts=0, score_function="softmax",
        normalize_top_k=False, balance_loss_coef=0.02, tie_embeddings=True, rope_theta=1e6),
    "dense": case(
        3, 0.0, 0.0, hidden_size=24, num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=0, top_k=0,
        num_shared_experts=0, intermediate_size=32, rms_norm_eps=1e-6, qk_norm=True),
    # One expert a token, two shared experts, and expert 5 is never chosen: its gradient is zero.
    "top1_shared2": case(
        2, 0.1, 0.1, {5: -2.0}, hidden_size=16, num_attention_heads=3, num_key_value_heads=1, head_dim=6,
        moe_intermediate_size=12, top_k=1, num_shared_experts=2, normalize_top_k=False, routed_scaling_factor=1.5,
        z_loss_coef=0.02, sequence_length=14),
    "softmax_groups": case(
        2, 0.1, 0.1, vocab_size=64, num_experts=9, top_k=2, num_groups=3, top_groups=1, score_function="softmax",
        routed_scaling_factor=0.5, balance_loss_coef=0.05, z_loss_coef=0.005, first_dense=1),
}


# ---- Inputs -----------------------------------------------------------------------------------------------------------


def parameter_shapes(c):
    """Name, shape and initial distribution (mean, deviation) of every parameter, in file order."""
    d, hd = c["hidden_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * hd, c["num_key_value_heads"] * hd
    yield "embed", (c["vocab_size"], d), (0.0, 0.7)
    for layer in range(c["num_hidden_layers"]):
        p = f"layers.{layer}."
        yield p + "attn_norm", (d,), (1.0, 0.2)
        yield p + "wqkv", (d, q + 2 * kv), (0.0, 1.3 / math.sqrt(d))
        if c["qk_norm"]:
            yield p + "q_norm", (hd,), (1.0, 0.2)
            yield p + "k_norm", (hd,), (1.0, 0.2)
        yield p + "wo", (q, d), (0.0, 1.0 / math.sqrt(q))
        yield p + "ffn_norm", (d,), (1.0, 0.2)
        if is_dense(c, layer):
            yield from swiglu_shapes(p, d, c["intermediate_size"])
            continue
        yield p + "router", (d, c["num_experts"]), (0.0, 1.0 / math.sqrt(d))
        if c["num_shared_experts"]:
            yield from swiglu_shapes(p + "shared.", d, c["num_shared_experts"] * c["moe_intermediate_size"])
        for expert in range(c["num_experts"]):
            yield from swiglu_shapes(f"{p}experts.{expert}.", d, c["moe_intermediate_size"])
    yield "final_norm", (d,), (1.0, 0.2)
    if not c["tie_embeddings"]:
        yield "head", (c["vocab_size"], d), (0.0, 1.0 / math.sqrt(d))


def swiglu_shapes(prefix, d, ffn):
    yield prefix + "w13", (d, 2 * ffn), (0.0, 1.0 / math.sqrt(d))
    yield prefix + "w2", (ffn, d), (0.0, 1.0 / math.sqrt(ffn))


def is_dense(c, layer):
    return c["num_experts"] == 0 or layer < c["first_dense"]


def draw(spec, seed):
    """Parameters, routing biases (f32 values) and a batch, from Python's own generator: the same on every machine."""
    c, rng = spec["config"], random.Random(seed)

    def normal(shape, mean, deviation):
        values = [rng.gauss(mean, deviation) for _ in range(math.prod(shape))]
        return torch.tensor(values, dtype=torch.float64).to(torch.float32).reshape(shape)

    parameters = {name: normal(shape, *law) for name, shape, law in parameter_shapes(c)}
    biases = {}
    for layer in range(c["num_hidden_layers"]):
        if not is_dense(c, layer):
            bias = normal((c["num_experts"],), 0.0, 0.05)
            for expert, value in spec["bias"].items():
                bias[expert] = value
            biases[f"layers.{layer}.router_bias"] = bias

    length, rows = c["sequence_length"], spec["sequences"] * c["sequence_length"]
    ids = [rng.randrange(c["vocab_size"]) for _ in range(rows)]
    targets = [IGNORE if rng.random() < spec["ignored"] else rng.randrange(c["vocab_size"]) for _ in range(rows)]
    starts = []
    for row in range(rows):
        position = row % length
        begins = position == 0 or rng.random() < spec["documents"]
        starts.append(position if begins else starts[-1])
    batch = dict(ids=ids, targets=targets, document_start=starts)
    return parameters, biases, {name: torch.tensor(values) for name, values in batch.items()}


# ---- The model, from its formulas -------------------------------------------------------------------------------------


class Model:
    """One forward pass; activations land in `acts`, integers and statistics in `facts`, the router's margin in `gap`."""

    def __init__(self, config, parameters, biases, batch):
        self.c, self.p, self.biases, self.batch = config, parameters, biases, batch
        self.length = config["sequence_length"]
        self.sequences = batch["ids"].numel() // self.length
        self.acts, self.facts, self.gap = {}, {}, math.inf

    def keep(self, name, value):
        value.retain_grad()
        self.acts[name] = value
        return value

    def forward(self):
        c, p = self.c, self.p
        x = self.keep("act.embed", p["embed"][self.batch["ids"]])
        balance = z = x.new_zeros(())
        for layer in range(c["num_hidden_layers"]):
            at = f"layers.{layer}."
            h = self.keep(at + "act.attn_norm", self.rms_norm(x, p[at + "attn_norm"]))
            x = self.keep(at + "act.attn_residual", x + self.attention(at, h) @ p[at + "wo"])
            h = self.keep(at + "act.ffn_norm", self.rms_norm(x, p[at + "ffn_norm"]))
            if is_dense(c, layer):
                y = self.swiglu(at, self.keep(at + "act.gate_up", h @ p[at + "w13"]))
            else:
                y, layer_balance, layer_z = self.moe(at, h)
                balance, z = balance + layer_balance, z + layer_z
            x = self.keep(at + "act.out", x + self.keep(at + "act.ffn", y))
        x = self.keep("act.final_norm", self.rms_norm(x, p["final_norm"]))
        logits = self.keep("act.logits", x @ p["embed" if c["tie_embeddings"] else "head"].T)
        losses = dict(ce=self.cross_entropy(logits), balance=c["balance_loss_coef"] * balance, z=c["z_loss_coef"] * z)
        losses["total"] = losses["ce"] + losses["balance"] + losses["z"]
        for name, value in losses.items():
            self.facts["loss." + name] = value.detach().reshape(1)
        return losses["total"]

    def rms_norm(self, x, weight):
        return x / (x.square().mean(-1, keepdim=True) + self.c["rms_norm_eps"]).sqrt() * weight

    def swiglu(self, at, gate_up):
        """`gate_up` is the input times `w13`."""
        gate, up = gate_up.chunk(2, -1)
        return (gate / (1 + torch.exp(-gate)) * up) @ self.p[at + "w2"]

    def rope(self, x):
        """`x` [sequences, length, heads, head_dim]: element i is rotated with element i + head_dim / 2."""
        half = self.c["head_dim"] // 2
        frequency = self.c["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(self.length, dtype=torch.float64)[:, None] * frequency
        cos, sin = angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def attention(self, at, x):
        c, p = self.c, self.p
        heads, kv_heads, hd = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        raw = self.keep(at + "act.qkv_raw", x @ p[at + "wqkv"])
        by_head = raw.view(self.sequences, self.length, heads + 2 * kv_heads, hd)
        q, k, v = by_head.split([heads, kv_heads, kv_heads], 2)
        if c["qk_norm"]:
            q, k = self.rms_norm(q, p[at + "q_norm"]), self.rms_norm(k, p[at + "k_norm"])
        qkv = self.keep(at + "act.qkv", torch.cat([self.rope(q), self.rope(k), v], 2).reshape(raw.shape))
        q, k, v = qkv.view(by_head.shape).split([heads, kv_heads, kv_heads], 2)

        group = heads // kv_heads
        q = q.reshape(self.sequences, self.length, kv_heads, group, hd)
        scores = torch.einsum("sihgd,sjhd->shgij", q, k) / math.sqrt(hd)
        j = torch.arange(self.length)
        start = self.batch["document_start"].view(self.sequences, self.length, 1)
        visible = (j >= start) & (j <= j[:, None])
        scores = scores.masked_fill(~visible[:, None, None], -math.inf)
        largest = scores.detach().amax(-1, keepdim=True)
        exponentials = (scores - largest).exp()
        total = exponentials.sum(-1, keepdim=True)
        lse = (largest + total.log()).squeeze(-1).permute(0, 3, 1, 2)
        self.facts[at + "act.lse"] = lse.detach().reshape(-1, heads)
        out = torch.einsum("shgij,sjhd->sihgd", exponentials / total, v)
        return self.keep(at + "act.attention", out.reshape(-1, heads * hd))

    def choose(self, choice):
        """Experts [rows, top_k], ascending, by score + bias `choice` [rows, experts]; updates the margin."""
        c = self.c
        if c["num_groups"] > 1:
            grouped = choice.view(-1, c["num_groups"], c["num_experts"] // c["num_groups"])
            group_score = grouped.topk(2, -1).values.sum(-1)
            ranked = group_score.sort(-1, descending=True)
            best, n = ranked.indices, c["top_groups"]
            self.gap = min(self.gap, (ranked.values[:, n - 1] - ranked.values[:, n]).min().item())
            allowed = torch.zeros_like(group_score, dtype=torch.bool).scatter(1, best[:, :n], True)
            choice = grouped.masked_fill(~allowed[..., None], -math.inf).reshape(choice.shape)
        ranked = choice.sort(-1, descending=True)
        k = c["top_k"]
        self.gap = min(self.gap, (ranked.values[:, k - 1] - ranked.values[:, k]).min().item())
        return ranked.indices[:, :k].sort(-1).values

    def moe(self, at, x):
        c, p = self.c, self.p
        n, k = c["num_experts"], c["top_k"]
        logits = self.keep(at + "act.router_logits", x @ p[at + "router"])
        scores = logits.sigmoid() if c["score_function"] == "sigmoid" else logits.softmax(-1)
        with torch.no_grad():
            experts = self.choose(scores + self.biases[at + "router_bias"])
        weights = scores.gather(1, experts)
        if c["normalize_top_k"]:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = self.keep(at + "act.router_weights", weights * c["routed_scaling_factor"])

        rows = [(experts == expert).any(-1).nonzero()[:, 0] for expert in range(n)]
        gate_up = torch.cat([x[rows[expert]] @ p[f"{at}experts.{expert}.w13"] for expert in range(n)])
        gate_up = self.keep(at + "act.expert_gate_up", gate_up).split([len(some) for some in rows])
        routed = torch.zeros_like(x)
        for expert in range(n):
            weight = torch.where(experts == expert, weights, 0.0).sum(-1)[rows[expert], None]
            y = weight * self.swiglu(f"{at}experts.{expert}.", gate_up[expert])
            routed = routed.index_add(0, rows[expert], y)
        y = self.keep(at + "act.routed", routed)
        if c["num_shared_experts"]:
            gate_up = self.keep(at + "act.shared_gate_up", x @ p[at + "shared.w13"])
            y = y + self.keep(at + "act.shared", self.swiglu(at + "shared.", gate_up))

        counts = torch.nn.functional.one_hot(experts, n).sum(1).view(self.sequences, self.length, n).sum(1)
        share = scores / scores.sum(-1, keepdim=True)
        frequency = counts.to(x.dtype) * n / (k * self.length)
        balance = (frequency * share.view(self.sequences, self.length, n).mean(1)).sum(-1)
        z = logits.exp().sum(-1).log().square().view(self.sequences, self.length)
        entropy = -(share * share.log()).sum(-1).view(self.sequences, self.length).sum(1)
        facts = dict(experts=experts, counts=counts, balance_loss=balance, z_loss=z.sum(1), entropy=entropy)
        self.facts |= {f"{at}act.{name}": value.detach() for name, value in facts.items()}
        return y, balance.mean(), z.mean()

    def cross_entropy(self, logits):
        targets = self.batch["targets"]
        counted = targets != IGNORE
        picked = logits.gather(1, torch.where(counted, targets, 0)[:, None])[:, 0]
        losses = torch.where(counted, logits.exp().sum(-1).log() - picked, 0.0)
        self.facts["loss.per_token"] = losses.detach()
        return losses.sum() / counted.sum()


def run(config, parameters, biases, batch, dtype):
    """All tensors of one forward and backward in `dtype`, by name, and the router's margin."""
    leaves = {name: value.detach().to(dtype, copy=True).requires_grad_() for name, value in parameters.items()}
    model = Model(config, leaves, {name: value.to(dtype) for name, value in biases.items()}, batch)
    model.forward().backward()
    tensors = dict(leaves) | biases | batch | model.acts | model.facts
    for name, value in (leaves | model.acts).items():
        # A tensor that the loss does not depend on (an expert without tokens) has no gradient in PyTorch.
        tensors["grad." + name] = torch.zeros_like(value) if value.grad is None else value.grad
    return {name: value.detach() for name, value in tensors.items()}, model.gap


def reference(name, spec):
    """The tensors of a case, drawn with the first seed whose routing has no near tie."""
    for seed in range(10_000):
        inputs = draw(spec, seed)
        tensors, gap = run(spec["config"], *inputs, torch.float64)
        if gap > ROUTING_GAP:
            break
    else:
        sys.exit(f"{name}: no seed below 10,000 keeps routing {ROUTING_GAP} away from a tie; use fewer tokens")
    for expert in spec["bias"]:
        used = [t for n, t in tensors.items() if n.endswith("act.counts") and t[:, expert].any()]
        assert not used, f"{name}: expert {expert} should not be chosen"
    single, _ = run(spec["config"], *inputs, torch.float32)
    worst, where = max((relative_error(single[n], t), n) for n, t in tensors.items())
    print(f"{name}: seed {seed}, routing margin {gap:.2e}, f32 error of PyTorch {worst:.1e} ({where})")
    return tensors


def relative_error(a, b):
    """Largest difference over the largest value of the tensor; integers must be equal."""
    if not b.is_floating_point():
        return 0.0 if torch.equal(a, b) else math.inf
    a, b = a.double(), b.double()
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


# ---- Kernels, by PyTorch's own ------------------------------------------------------------------------------------------


def kernels():
    """Single kernels at lengths that cross the borders of our blocks (64 keys, 256 queries or rows of the head, 4,096
    elements of the gradient's norm), computed by PyTorch's functions and its optimizer, not by formulas written here."""
    rng = random.Random(20)

    def normal(*shape, mean=0.0, deviation=1.0):
        values = [rng.gauss(mean, deviation) for _ in range(math.prod(shape))]
        return torch.tensor(values, dtype=torch.float64).to(torch.float32).double().reshape(shape)

    tensors = {}

    def keep(kernel, total, inputs, **others):
        """Inputs with their gradients under `grad.`, and what else belongs to the kernel."""
        total.backward()
        tensors.update({f"{kernel}.{name}": value.detach() for name, value in (inputs | others).items()})
        tensors.update({f"grad.{kernel}.{name}": value.grad for name, value in inputs.items()})

    def leaves(**inputs):
        return {name: value.requires_grad_() for name, value in inputs.items()}

    functional = torch.nn.functional
    attention(normal, leaves, keep)

    x, weight, dy = normal(100, 40), normal(40, mean=1.0, deviation=0.2), normal(100, 40)
    norm = leaves(x=x, weight=weight)
    y = functional.rms_norm(x, (40,), weight, NORM_EPS)
    keep("norm", (y * dy).sum(), norm, y=y, dy=dy)

    head = leaves(x=normal(300, 12), table=normal(70, 12, deviation=0.5))
    targets = torch.tensor([IGNORE if rng.random() < 0.2 else rng.randrange(70) for _ in range(300)])
    classes = torch.where(targets == IGNORE, -100, targets)
    loss = functional.cross_entropy(head["x"] @ head["table"].T, classes)
    keep("head", loss, head, targets=targets, loss=loss.reshape(1))

    ffn = leaves(
        x=normal(300, 10), w13=normal(3, 10, 12, deviation=0.4), w2=normal(3, 6, 10, deviation=0.5),
        row_weight=normal(300, mean=0.7, deviation=0.3))
    dy, parts = normal(300, 10), []
    for expert, rows in enumerate(ffn["x"].split(FFN_ROWS)):
        gate, up = (rows @ ffn["w13"][expert]).chunk(2, -1)
        parts.append((functional.silu(gate) * up) @ ffn["w2"][expert])
    y = ffn["row_weight"][:, None] * torch.cat(parts)
    keep("ffn", (y * dy).sum(), ffn, y=y, dy=dy, rows=torch.tensor(FFN_ROWS))

    optimizer(normal, tensors)
    return tensors


NORM_EPS = 1e-5
FFN_ROWS = [140, 1, 159]
DOCUMENTS = [0, 20, 290, 300]


def attention(normal, leaves, keep):
    """Norms of heads, rotation and attention in a row: 4 heads of 4 over 2 of keys and values, 300 positions, a document of
    270 among shorter ones."""
    heads, kv_heads, hd, length = 4, 2, 4, DOCUMENTS[-1]
    inputs = leaves(
        raw=normal(length, (heads + 2 * kv_heads) * hd), q_norm=normal(hd, mean=1.5, deviation=0.2),
        k_norm=normal(hd, mean=1.5, deviation=0.2))
    q, k, v = inputs["raw"].view(length, -1, hd).transpose(0, 1).split([heads, kv_heads, kv_heads])
    frequency = 10000.0 ** (-torch.arange(0, hd, 2, dtype=torch.float64) / hd)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    turn = torch.polar(torch.ones_like(angle), angle)

    def place(x, weight):
        x = torch.nn.functional.rms_norm(x, (hd,), weight, NORM_EPS)
        pairs = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat([pairs.real, pairs.imag], -1)

    q, k = place(q, inputs["q_norm"]), place(k, inputs["k_norm"])
    k, v = (x.repeat_interleave(heads // kv_heads, 0) for x in (k, v))
    sizes = torch.tensor(DOCUMENTS).diff()
    start = torch.tensor(DOCUMENTS[:-1]).repeat_interleave(sizes)
    mask = (start[:, None] == start) & torch.ones(length, length, dtype=torch.bool).tril()
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = out.transpose(0, 1).reshape(length, heads * hd)
    scores = (q @ k.transpose(1, 2) / math.sqrt(hd)).masked_fill(~mask, -math.inf)
    lse = torch.logsumexp(scores, -1).T
    dout = normal(length, heads * hd)
    keep("attention", (out * dout).sum(), inputs, out=out, lse=lse, dout=dout, document_start=start)


def optimizer(normal, tensors):
    """Three steps of AdamW on a matrix that decays and a norm that does not, clipped at the first and the last."""
    parameters = dict(matrix=normal(60, 70), norm=normal(40, mean=1.0, deviation=0.2))
    tensors |= {f"adamw.before.{name}": value.clone() for name, value in parameters.items()}
    groups = [dict(params=[parameters["matrix"]], weight_decay=0.1), dict(params=[parameters["norm"]], weight_decay=0.0)]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    norms = []
    for step, (rate, deviation) in enumerate([(0.01, 1.0), (0.02, 0.005), (0.015, 0.3)], 1):
        for name, parameter in parameters.items():
            parameter.grad = normal(*parameter.shape, deviation=deviation)
            tensors[f"adamw.gradient.{step}.{name}"] = parameter.grad.clone()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0))
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
    tensors["adamw.norms"] = torch.stack(norms)
    for name, parameter in parameters.items():
        tensors[f"adamw.after.{name}"] = parameter
        tensors[f"adamw.first.{name}"] = adamw.state[parameter]["exp_avg"]
        tensors[f"adamw.second.{name}"] = adamw.state[parameter]["exp_avg_sq"]


# ---- Files ------------------------------------------------------------------------------------------------------------


def encode(tensors):
    """safetensors: header length, JSON header, little-endian data; F32, and U32 for integers."""
    header, blobs, offset = {}, [], 0
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.is_floating_point():
            kind, values = "f", tensor.to(torch.float32)
            assert values.isfinite().all(), f"{name} is not finite"
        else:
            kind, values = "I", tensor
        blob = struct.pack(f"<{tensor.numel()}{kind}", *values.flatten().tolist())
        dtype = {"f": "F32", "I": "U32"}[kind]
        header[name] = dict(dtype=dtype, shape=list(tensor.shape), data_offsets=[offset, offset + len(blob)])
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(blobs)


def decode(data):
    (size,) = struct.unpack_from("<Q", data)
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        kind, dtype = {"F32": ("f", torch.float64), "U32": ("I", torch.int64)}[entry["dtype"]]
        values = struct.unpack(f"<{(end - begin) // 4}{kind}", body[begin:end])
        tensors[name] = torch.tensor(values, dtype=dtype).reshape(entry["shape"])
    return tensors


def write(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, spec in CASES.items():
        tensors = reference(name, spec)
        (folder / f"{name}.json").write_text(json.dumps(spec["config"], indent=2) + "\n")
        (folder / f"{name}.safetensors").write_bytes(encode(tensors))
    (folder / "kernels.safetensors").write_bytes(encode(kernels()))


def check(folder):
    """Compares `folder` with a fresh set; returns the differences as sentences."""
    problems = []
    with tempfile.TemporaryDirectory() as fresh:
        fresh = pathlib.Path(fresh)
        write(fresh)
        expected, found = ({f.name for f in d.iterdir() if f.suffix != ".md"} for d in (fresh, folder))
        problems += [f"{name} is missing" for name in sorted(expected - found)]
        problems += [f"{name} belongs to no case" for name in sorted(found - expected)]
        for name in sorted(expected & found):
            old, new = (folder / name).read_bytes(), (fresh / name).read_bytes()
            if old == new:
                continue
            if name.endswith(".json"):
                problems.append(f"{name} differs")
                continue
            problems += [f"{name}: {text}" for text in compare(decode(old), decode(new))]
    return problems


def compare(old, new):
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            yield f"{name} is only in the {'new' if name in new else 'old'} file"
        elif old[name].shape != new[name].shape or old[name].dtype != new[name].dtype:
            yield f"{name} has another shape or type"
        elif (error := relative_error(old[name], new[name])) > CHECK_TOLERANCE:
            yield f"{name} differs by {error:.1e}"


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments.add_argument("--out", type=pathlib.Path, default=FIXTURES, help="folder of the fixtures")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    if not options.check:
        write(options.out)
        return
    problems = check(options.out)
    if problems:
        sys.exit("\n".join(problems) + f"\n{len(problems)} differences: run without --check to rewrite the fixtures")
    print("the fixtures are what this script makes")


if __name__ == "__main__":
    main()
