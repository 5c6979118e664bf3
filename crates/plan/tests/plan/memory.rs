//! Memory of pipeline ranks: what is listed tensor by tensor is what is summed, and each part holds what its name says.

use unisono_plan::{
    Architecture, Cluster, DispatchKind, Habits, Parallelism, Precision, Pricer, RankMemory, RankTensors,
    Routing, Software, Trainable, Training, Unit,
};

const LISTED: [&str; 12] = [
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "dispatch",
    "operands",
    "temporary",
    "logits",
    "communication",
    "workspace",
    "fragmentation",
    "context",
];

fn training() -> Training {
    Training { global_batch: 6144, dispatch: DispatchKind::default(), ..Training::default() }
}

/// `[pipeline rank]` sums and list.
fn ranks(model: &str, layout: &str, training: &Training) -> Vec<(RankMemory, RankTensors)> {
    let model = Architecture::built_in(model).unwrap();
    let layout: Parallelism = layout.parse().unwrap();
    layout.check(&model, training).unwrap_or_else(|error| panic!("{} {layout}: {error}", model.name));
    let pricer = Pricer::new(&model, &Cluster::parse("h800x2048").unwrap(), training);
    let of = |rank| (pricer.rank_memory(&layout, rank), pricer.rank_tensors(&layout, rank));
    (0..layout.pipeline).map(of).collect()
}

#[track_caller]
fn near(found: f64, expected: f64, what: impl FnOnce() -> String) {
    assert!((found - expected).abs() <= 1e-9 * expected.abs().max(1.0), "{}: {found} for {expected}", what());
}

#[track_caller]
fn listed_as_summed(model: &str, layout: &str, training: &Training) {
    for (rank, (memory, tensors)) in ranks(model, layout, training).iter().enumerate() {
        for (part, bytes) in memory.parts() {
            near(tensors.bytes(part), bytes, || format!("{part} of {model} {layout}, rank {rank}"));
            assert!(bytes >= 0.0, "{part} of {model} {layout}, rank {rank}: {bytes}");
        }
        let all: f64 = LISTED.iter().map(|part| tensors.bytes(part)).sum();
        near(all, memory.total(), || format!("all of {model} {layout}, rank {rank}"));
        assert!(tensors.held.iter().all(|of| LISTED.contains(&of.part) && !of.name.is_empty()));
    }
}

#[test]
fn listed_tensors_are_what_is_summed() {
    let layouts: [(&str, &[&str]); 8] = [
        (
            "DeepSeek-V3",
            &["pp16 vp2 ep64 dp128 dualpipev", "tp2 pp8 vp2 ep32 dp64 interleaved", "pp8 ep8 dp32 zb1p"],
        ),
        ("Mixtral-8x7B", &["tp2 pp4 ep8 dp8", "pp4 vp4 ep4 dp8 interleaved", "ep8 dp16 mb2"]),
        ("Llama-3.1-70B", &["tp8 pp4 dp4 mb2", "tp4 pp8 vp5 cp2 dp2 interleaved", "dp64"]),
        ("Llama-3.2-1B", &["pp2 dp8", "tp2 dp8"]),
        ("GPT3-175B", &["tp8 pp16 dp4", "tp8 pp8 vp2 dp4 dualpipev"]),
        ("Qwen3-30B-A3B", &["tp4 pp2 ep16 etp2 dp16", "ep8 dp64"]),
        ("Nemotron-3-Nano-30B", &["tp2 pp4 ep16 dp16"]),
        ("GPT-OSS-20B", &["pp2 ep4 dp8"]),
    ];
    let again = ["none", "selective", "full", "mlp+moe_act+layernorm", "moe", "mla_up_proj+core_attn"];
    for (model, layouts) in layouts {
        for layout in layouts {
            for again in again {
                for zero in 0..4 {
                    listed_as_summed(model, &format!("{layout} zero{zero} recompute={again}"), &training());
                }
            }
        }
    }
}

#[test]
fn listed_tensors_are_what_is_summed_in_any_training() {
    let layout = "pp4 vp2 ep8 dp16 interleaved zero1";
    for software in
        [Software::Megatron2021, Software::DeepSpeed2021, Software::TorchEager, Software::TorchCompiled]
    {
        listed_as_summed("DeepSeek-V3", layout, &Training { software, ..training() });
        listed_as_summed("GPT3-175B", "tp8 pp8 dp4 zb1p", &Training { software, ..training() });
    }
    for compute in [Precision::Fp8, Precision::F32, Precision::Nvfp4] {
        listed_as_summed("DeepSeek-V3", layout, &Training { compute, wire: compute, ..training() });
    }
    for routing in [Routing::PowerLaw { exponent: 1.2 }, Routing::Measured { loads: vec![1.0, 5.0] }] {
        listed_as_summed("DeepSeek-V3", layout, &Training { routing, ..training() });
    }
    for captured in [layout, "pp4 ep8 dp16 zb1p zero1", "pp2 vp2 ep8 dp16 dualpipev recompute=full"] {
        let habits = Habits { captured_attention: true, experts_in_turn: true, ..Habits::default() };
        listed_as_summed("DeepSeek-V3", captured, &Training { habits, ..training() });
        listed_as_summed("DeepSeek-V3", captured, &Training { trainable: Trainable::Adapters, ..training() });
    }
}

/// Bytes of one tensor of that name.
#[track_caller]
fn one(tensors: &RankTensors, name: &str) -> f64 {
    tensors.held.iter().find(|of| of.name == name).unwrap_or_else(|| panic!("{name}: {tensors:#?}")).bytes
}

#[test]
fn shapes_are_those_that_parallelism_leaves_a_gpu() {
    let all = ranks("DeepSeek-V3", "tp2 pp4 ep16 dp8 zero1", &training());
    let (first, last) = (&all[0].1, &all[3].1);
    let shape = |tensors: &RankTensors, name: &str| {
        let found = tensors.parameters.iter().find(|of| of.name == name);
        found.unwrap_or_else(|| panic!("{name}")).shape.clone()
    };
    assert_eq!(shape(last, "q_a_proj"), [1536.0, 7168.0]);
    assert_eq!(shape(last, "q_b_proj"), [128.0 * 192.0 / 2.0, 1536.0]);
    assert_eq!(shape(last, "kv_a_proj_with_mqa"), [576.0, 7168.0]);
    assert_eq!(shape(last, "kv_b_proj"), [128.0 * 256.0 / 2.0, 512.0]);
    assert_eq!(shape(last, "o_proj"), [7168.0, 128.0 * 128.0 / 2.0]);
    assert_eq!(shape(last, "experts.down_proj"), [16.0, 7168.0, 2048.0]);
    assert_eq!(shape(last, "router"), [256.0, 7168.0]);
    assert_eq!(shape(first, "gate_proj"), [9216.0, 7168.0]);
    assert_eq!(shape(first, "embed_tokens"), [129_280.0 / 2.0, 7168.0]);
    // Master copy and moments of 12 bytes over all replicas, of experts over those that hold them.
    let states = |name: &str| last.parameters.iter().find(|of| of.name == name).unwrap().bytes[2];
    assert_eq!(states("q_a_proj"), 12.0 * 1536.0 * 7168.0 / 8.0);
    assert_eq!(states("experts.down_proj"), 12.0 * 16.0 * 7168.0 * 2048.0);
    // Three dense layers lie on the first rank, the head and what predicts a further token on the last.
    let dense = first.parameters.iter().find(|of| of.name == "gate_proj").unwrap();
    assert_eq!(dense.layers, 3);
    assert_eq!(last.parameters.iter().find(|of| of.name == "eh_proj").unwrap().unit, Unit::Head);
    assert!(!last.parameters.iter().any(|of| of.unit == Unit::Embedding));
}

#[test]
fn dispatch_is_for_the_rows_of_a_slow_step() {
    let layout = "pp4 ep16 dp16 zero1";
    let skewed = Training { routing: Routing::PowerLaw { exponent: 1.0 }, ..training() };
    let model = Architecture::built_in("DeepSeek-V3").unwrap();
    let pricer = Pricer::new(&model, &Cluster::parse("h800x2048").unwrap(), &skewed);
    let rows = pricer.unevenness(&layout.parse().unwrap()).p95;
    assert!(rows > 1.2, "{rows}");
    let [even, uneven] = [&training(), &skewed].map(|training| ranks("DeepSeek-V3", layout, training));
    for ((even, tensors), (uneven, _)) in even.iter().zip(&uneven) {
        near(uneven.dispatch, rows * even.dispatch, || "dispatch".into());
        // 8 experts a token, 16 bits an element.
        assert_eq!(one(tensors, "rows dispatched to experts"), 4096.0 * 8.0 * 7168.0 * 2.0);
    }
    let dense = ranks("Llama-3.1-8B", "dp64", &training());
    assert_eq!(dense[0].0.dispatch, 0.0);
}

/// Rows that are not kept are dispatched again in the backward: one layer's, with the gradients that land and leave.
#[test]
fn rows_that_are_computed_again_are_dispatched_again() {
    let all = ranks("DeepSeek-V3", "pp4 ep16 dp16 zero1 recompute=full", &training());
    let rows = 4096.0 * 8.0 * 7168.0 * 2.0;
    near(all[1].0.dispatch, 3.0 * rows, || "dispatch".into());
    let kept = all[1].1.held.iter().find(|of| of.name == "rows dispatched to experts").unwrap();
    assert!(kept.recomputed && kept.count == 0);
}

#[test]
fn communication_is_buckets_what_stages_receive_and_channels() {
    const MIB: f64 = (1u64 << 20) as f64;
    let message = 4096.0 * 4096.0 * 2.0;
    let of = |layout: &str| ranks("Llama-3.1-8B", layout, &training());
    // 1F1B: ranks have 4, 3, 2 and 1 micro-batches in flight; the first stage receives nothing.
    let all = of("pp4 dp16 zero1");
    let received: Vec<f64> = all.iter().map(|(memory, _)| memory.communication.received / message).collect();
    assert_eq!(received, [0.0, 3.0, 2.0, 1.0]);
    // Pipeline and replicas: 32 channels of 4 MiB both ways each.
    assert!(all.iter().all(|(memory, _)| memory.communication.channels == 2.0 * 256.0 * MIB));
    assert!(all.iter().all(|(memory, _)| memory.communication.buckets == 0.0));
    // DualPipeV turns on the last rank, which hands on to itself.
    let turned = of("pp4 vp2 dp16 dualpipev zero1");
    let held = |rank: usize| one(&turned[rank].1, "inputs of stages, as received");
    let count = |rank: usize| turned[rank].0.communication.received / held(rank);
    assert_eq!([count(0), count(1), count(3)], [1.0, 9.0, 5.0]);
    // A layer's gradients in 32 bits before they are reduced, and two layers gathered in 16, with both tables.
    let layer = (4096.0 * 4096.0 * 2.5 + 3.0 * 4096.0 * 14_336.0) + 2.0 * 4096.0 + 4096.0 / 32.0;
    let buckets = |layout: &str| of(layout)[0].0.communication.buckets;
    near(buckets("dp64 zero2"), 4.0 * layer, || "zero2".into());
    let tables = 2.0 * 2.0 * 128_256.0 * 4096.0;
    near(buckets("dp64 zero3"), (4.0 + 2.0 * 2.0) * layer + tables, || "zero3".into());
    assert_eq!(of("dp1 zero1")[0].0.communication.total(), 0.0);
}
