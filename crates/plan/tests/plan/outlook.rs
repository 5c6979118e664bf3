//! A run's outlook, its bytes by link and what would help, against published facts and formulas.

use unisono_plan::collectives::places_touched;
use unisono_plan::{
    Architecture, Axis, Breakdown, Cluster, DispatchKind, FeedForward, Gpu, Level, Optimizer, Outlook,
    Parallelism, Precision, Priced, Pricer, Recomputation, Routing, Training, bottleneck, changes,
};

/// DeepSeek-V3's pre-training: 15,360 sequences of 4,096 tokens a step, 14.8 T tokens.
fn deepseek() -> (Architecture, Cluster, Training, Parallelism) {
    let training = Training {
        global_batch: 15_360,
        tokens: 14.8e12,
        compute: Precision::Fp8,
        wire: Precision::Fp8,
        optimizer: Optimizer { moments: Precision::Bf16, ..Optimizer::default() },
        ..Training::default()
    };
    let layout = "pp16 vp2 ep64 dp128 mb1 dualpipev zero1".parse().unwrap();
    let model = Architecture::built_in("DeepSeek-V3").unwrap();
    (model, Cluster::parse("h800x2048").unwrap(), training, layout)
}

#[test]
fn deepseek_v3_cost_what_its_step_says() {
    let (model, cluster, training, layout) = deepseek();
    let mut priced = Pricer::new(&model, &cluster, &training).price(&layout).unwrap();
    priced.step_s = 19.926;
    priced.interval_s = [16.0, 25.0];
    let outlook = Outlook::of(&priced, &cluster, &layout, &training);
    // The report: 2.664 M H800 hours, 180 K a trillion tokens, $2 each.
    assert!((outlook.gpu_hours.value / 2.664e6 - 1.0).abs() < 0.005, "{:?}", outlook.gpu_hours);
    assert!((outlook.gpu_hours_per_trillion(&training).value / 180e3 - 1.0).abs() < 0.01);
    assert!((outlook.usd_without_failures.value / 5.328e6 - 1.0).abs() < 0.005);
    // Whatever takes longer costs as much more; tokens a second fall.
    let usd = outlook.usd_per_trillion(&training);
    // Failures are rare, so that little joins what the step is uncertain by.
    let relative = usd.interval[1] / usd.value / (25.0 / 19.926);
    assert!((1.0..1.001).contains(&relative), "{relative}");
    assert!((outlook.tokens_per_s.interval[0] * 25.0 / (15_360.0 * 4096.0) - 1.0).abs() < 1e-12);
    let goodput = outlook.goodput;
    assert!(goodput.interval[0] > 0.9 && goodput.interval[1] < 1.0);
    assert!(goodput.interval[0] < goodput.value && goodput.value < goodput.interval[1]);
    assert!((outlook.usd.value * goodput.value / outlook.usd_without_failures.value - 1.0).abs() < 1e-12);
    let young = (2.0 * outlook.checkpoint_s * outlook.failure_every_s.value).sqrt();
    assert_eq!(outlook.checkpoint_every_s.value, young);
    // 419 failures were counted: a standard deviation of 1 in sqrt(419), an 80% interval 1.2816 of them wide.
    let every = outlook.failure_every_s;
    assert!(((every.interval[1] / every.value).ln() * 419.0_f64.sqrt() - 1.2816).abs() < 1e-9);
    let of_checkpoints = (outlook.checkpoint_every_s.interval[1] / young).ln();
    assert!((2.0 * of_checkpoints - (every.interval[1] / every.value).ln()).abs() < 1e-9);
    // A rate that is given is known, yet how many come is not.
    let given = Cluster { failures_per_gpu_hour: 2e-5, ..cluster.clone() };
    let given = Outlook::of(&priced, &given, &layout, &training);
    assert_eq!(given.failure_every_s.interval, [given.failure_every_s.value; 2]);
    assert!(given.goodput.interval[0] < given.goodput.value);
    assert!(outlook.failures_are_rare);
}

#[test]
fn failures_that_come_too_often_for_youngs_formula_are_seen() {
    let (model, cluster, training, layout) = deepseek();
    let priced = Pricer::new(&model, &cluster, &training).price(&layout).unwrap();
    let outlook = |failures_per_gpu_hour: f64| {
        let cluster = Cluster { failures_per_gpu_hour, ..cluster.clone() };
        Outlook::of(&priced, &cluster, &layout, &training)
    };
    // Every 7 hours, every hour, every half hour, every minute.
    for (rate, rare) in [(7e-5, true), (4.8e-4, true), (9.6e-4, false), (0.03, false)] {
        let outlook = outlook(rate);
        assert_eq!(outlook.failures_are_rare, rare, "a failure every {} s", outlook.failure_every_s.value);
    }
}

#[test]
fn without_failures_all_of_the_time_trains() {
    let (model, cluster, training, layout) = deepseek();
    let priced = Pricer::new(&model, &cluster, &training).price(&layout).unwrap();
    let lasting = Cluster { failures_per_gpu_hour: 0.0, ..cluster };
    let outlook = Outlook::of(&priced, &lasting, &layout, &training);
    assert!(!outlook.fails() && outlook.failures_are_rare);
    assert_eq!(outlook.goodput.interval, [1.0, 1.0]);
    let (with, without) = (outlook.usd.interval, outlook.usd_without_failures.interval);
    assert!((with[0] / without[0] - 1.0).abs() < 1e-12 && (with[1] / without[1] - 1.0).abs() < 1e-12);
    assert!((outlook.days.value * 24.0 * 2048.0 / outlook.gpu_hours.value - 1.0).abs() < 1e-12);
}

#[test]
fn bytes_by_link_follow_the_formulas() {
    let (model, cluster, training, layout) = deepseek();
    let traffic = Pricer::new(&model, &cluster, &training).traffic(&layout);
    assert_eq!(traffic.bytes[Axis::Tensor as usize], [0.0, 0.0]);
    assert_eq!(traffic.bytes[Axis::Context as usize], [0.0, 0.0]);
    // 120 micro-batches of 4,096 tokens pass 59 MoE layers on 16 ranks (58 and one of multi-token prediction), each out in
    // 8 bits and three times in 16.
    let away = places_touched(128, 8, 4) * 7.0 / 8.0;
    let row = 7168.0 * (Precision::Fp8.bytes() + 3.0 * 2.0);
    let expected = 120.0 * 4096.0 * 59.0 / 16.0 * away * row;
    let network = traffic.bytes[Axis::Expert as usize][1];
    assert!((network / expected - 1.0).abs() < 1e-9, "{network} {expected}");
    // 31 boundaries between 32 chunks, both ways; both chunks at the turn of the V lie on one rank.
    let message = 2.0 * 4096.0 * 7168.0;
    assert_eq!(traffic.bytes[Axis::Pipeline as usize], [0.0, 120.0 * message * 2.0 * 30.0 / 16.0]);
    assert_eq!(traffic.of_level(1), traffic.bytes.iter().map(|levels| levels[1]).sum::<f64>());
}

#[test]
fn dispatch_crosses_rail_and_spine() {
    let (model, cluster, training, layout) = deepseek();
    let outer = cluster.levels[1].clone();
    // Experts over 64 ranks: eight servers, two in a rail.
    let of = |oversubscription: f64, width: usize| {
        let mut cluster = cluster.clone();
        cluster.levels.insert(
            1,
            Level { name: "rail".into(), width, latency_s: 0.5 * outer.latency_s, ..outer.clone() },
        );
        cluster.levels[2].latency_s = 0.5 * outer.latency_s;
        cluster.levels[2].oversubscription = oversubscription;
        let pricer = Pricer::new(&model, &cluster, &training);
        (pricer.traffic(&layout).bytes[Axis::Expert as usize].clone(), pricer.price(&layout).unwrap())
    };
    let flat = Pricer::new(&model, &cluster, &training).traffic(&layout).bytes[Axis::Expert as usize].clone();
    let (bytes, full) = of(1.0, 16);
    assert_eq!(bytes[0], flat[0]);
    assert!(
        (bytes[1] / flat[1] * 7.0 - 1.0).abs() < 1e-9 && ((bytes[1] + bytes[2]) / flat[1] - 1.0).abs() < 1e-9
    );
    let (_, narrow) = of(16.0, 16);
    assert!(narrow.breakdown.expert_s > 5.0 * full.breakdown.expert_s);
    // Nothing of it leaves a rail of eight servers.
    let [(bytes, full), (_, narrow)] = [1.0, 16.0].map(|over| of(over, 64));
    assert_eq!(bytes[2], 0.0);
    assert_eq!(narrow.breakdown.expert_s, full.breakdown.expert_s);
}

#[test]
fn pipeline_messages_cross_servers_where_neighbours_lie_in_two() {
    let model = Architecture::built_in("Llama-3.1-70B").unwrap();
    let training = Training { compute: Precision::Bf16, routing: Routing::Balanced, ..deepseek().2 };
    let sent = |gpus: &str, layout: &str| {
        let cluster = Cluster::parse(gpus).unwrap();
        let layout: Parallelism = layout.parse().unwrap();
        let pricer = Pricer::new(&model, &cluster, &training);
        (pricer.traffic(&layout).bytes[Axis::Pipeline as usize].clone(), pricer.price(&layout).unwrap())
    };
    // 64 ranks in servers of 8: 7 of 63 boundaries cross, both ways.
    let (bytes, whole) = sent("h100x64", "pp64 mb1 1f1b zero0 recompute=full");
    assert!((bytes[1] / (bytes[0] + bytes[1]) - 7.0 / 63.0).abs() < 1e-12, "{bytes:?}");
    // Half as many boundaries as pairs of ranks: 7 of 15.
    let (bytes, _) = sent("h100x64", "tp4 pp16 mb1 1f1b zero0 recompute=full");
    assert!((bytes[1] / (bytes[0] + bytes[1]) - 7.0 / 15.0).abs() < 1e-12, "{bytes:?}");
    // The slowest message sets the pace: within one NVLink domain it is faster.
    let (bytes, inside) = sent("gb200x64", "pp64 mb1 1f1b zero0 recompute=full");
    assert_eq!(bytes.len(), 1);
    assert!(inside.breakdown.pipeline_s < 0.5 * whole.breakdown.pipeline_s);
}

#[test]
fn sharded_gradients_are_reduced_in_every_micro_batch() {
    let model = Architecture::built_in("Llama-3.1-8B").unwrap();
    let cluster = Cluster::parse("h100x64").unwrap();
    let training = Training { compute: Precision::Bf16, global_batch: 1024, ..deepseek().2 };
    let pricer = Pricer::new(&model, &cluster, &training);
    let of = |layout: &str| {
        let layout: Parallelism = layout.parse().unwrap();
        let bytes: f64 = pricer.traffic(&layout).bytes[Axis::Data as usize].iter().sum();
        (bytes, pricer.price(&layout).unwrap())
    };
    let (whole, sharded) = (of("dp64 mb1 zero1"), of("dp64 mb1 zero2"));
    // Gradients in 32 bits, parameters in 16: 4 + 2 against 16 x 4 + 2 bytes a parameter.
    assert!((sharded.0 / whole.0 - 66.0 / 6.0).abs() < 1e-9);
    let traffic_s =
        |priced: &Priced| priced.breakdown.data_s + priced.breakdown.hidden_s[Axis::Data as usize];
    assert!(traffic_s(&sharded.1) > 10.0 * traffic_s(&whole.1) && sharded.1.step_s >= whole.1.step_s);
    assert!(sharded.1.memory.gradients < 0.02 * whole.1.memory.gradients);
    // Stages of a pipeline gather once a step, in bytes as in seconds.
    let (once, kept) = (of("pp4 dp16 mb1 1f1b zero1"), of("pp4 dp16 mb1 1f1b zero3"));
    assert_eq!((once.0, once.1.step_s), (kept.0, kept.1.step_s));
}

#[test]
fn communication_is_exposed_or_hidden_axis_by_axis() {
    let (model, cluster, training, layout) = deepseek();
    let pricer = Pricer::new(&model, &cluster, &training);
    let step = pricer.price(&layout).unwrap().breakdown;
    let [expert, data] = [Axis::Expert as usize, Axis::Data as usize];
    assert!(step.hidden_s[expert] > step.exposed_s()[expert] && step.hidden_s[data] > 0.0);
    assert_eq!([step.hidden_s[Axis::Tensor as usize], step.hidden_s[Axis::Context as usize]], [0.0, 0.0]);
    assert_eq!(step.all_hidden_s(), step.hidden_s.iter().sum::<f64>());
    // What a schedule hides more of it exposes less of.
    let refined = pricer.price_simulated(&layout).unwrap().breakdown;
    for axis in 0..Axis::ALL.len() {
        let all = |step: &Breakdown| step.exposed_s()[axis] + step.hidden_s[axis];
        assert!((all(&refined) - all(&step)).abs() < 1e-9 * all(&step).max(1.0), "{axis}");
    }
    let alone = DispatchKind { overlapped: false, ..training.dispatch };
    let alone = Pricer::new(&model, &cluster, &Training { dispatch: alone, ..training });
    assert!(alone.price(&layout).unwrap().breakdown.hidden_s[expert].abs() < 1e-9);
    let traffic = pricer.traffic(&layout);
    assert_eq!(
        [Axis::Tensor, Axis::Expert, Axis::Pipeline].map(|axis| traffic.links(axis)),
        ["", "NVLink + network", "network"]
    );
}

#[test]
fn the_terms_of_a_price_give_the_price() {
    let (model, cluster, training, layout) = deepseek();
    let pricer = Pricer::new(&model, &cluster, &training);
    let priced = pricer.price(&layout).unwrap();
    let interval = pricer.interval_terms(&priced.breakdown);
    assert!(interval.borrowed > 0.0, "H800 has no table of its own");
    assert_eq!(priced.step_s * interval.spread(), priced.interval_s[1]);
    let overhead = pricer.overhead_terms(&layout);
    let seconds = overhead.once_s + overhead.straggler * overhead.servers.log2() * overhead.rest_s;
    assert!((seconds / priced.breakdown.overhead_s - 1.0).abs() < 1e-9);
    let rank = priced.worst_rank;
    let (memory, terms) = (pricer.rank_memory(&layout, rank), pricer.memory_terms(&layout, rank));
    assert_eq!(memory.weights, terms.widths[0] * terms.parameters.iter().sum::<f64>());
    assert!(memory.optimizer < terms.widths[2] * terms.parameters.iter().sum::<f64>());
    let layers: f64 =
        pricer.kinds().iter().zip(pricer.passes_by_kind(&layout)).fold(0.0, |most, (kind, passes)| {
            if kind.0.ffn == FeedForward::Moe { most.max(passes.forward.grouped_s) } else { most }
        });
    let kernel = pricer.kernel_terms(&layout);
    assert!(kernel.seconds < layers && kernel.seconds > 0.5 * layers, "{kernel:?} of {layers}");
    assert!((kernel.factor * kernel.roofline_s() / kernel.efficiency / kernel.seconds - 1.0).abs() < 1e-12);
    let axes: Vec<Axis> = pricer.exchange_terms(&layout).iter().map(|terms| terms.axis).collect();
    assert_eq!(axes, [Axis::Expert, Axis::Expert, Axis::Pipeline, Axis::Data, Axis::Data]);
}

#[test]
fn what_a_gpu_must_have_is_more_than_what_is_allocated() {
    let (model, cluster, training, layout) = deepseek();
    let memory = Pricer::new(&model, &cluster, &training).price(&layout).unwrap().memory;
    // Gaps between what comes and goes; a context and the communicators of pipeline, data, expert and expert-data groups.
    let passing = memory.activations + memory.dispatch + memory.temporary + memory.logits;
    assert!((memory.fragmentation / (passing + memory.communication.received) - 0.12).abs() < 1e-9);
    assert_eq!(
        [memory.context, memory.communication.channels],
        [512.0, 4.0 * 256.0].map(|mib| mib * 1048576.0)
    );
    let more = memory.fragmentation + memory.context + memory.communication.channels;
    assert!((memory.total() - memory.allocated() - more).abs() < 1.0);
    let full = Cluster { gpu: Gpu { memory_bytes: memory.total() - 1.0, ..cluster.gpu }, ..cluster };
    assert!(!Pricer::new(&model, &full, &training).price(&layout).unwrap().fits);
}

#[test]
fn formats_of_32_bits_cost_what_they_are() {
    let model = Architecture::built_in("Llama-3.1-8B").unwrap();
    let cluster = Cluster::parse("h100x64").unwrap();
    let of = |compute| {
        let optimizer = Optimizer::default();
        let training = Training { compute, optimizer, global_batch: 256, ..deepseek().2 };
        Pricer::new(&model, &cluster, &training).price(&"dp64 mb1 zero0".parse().unwrap()).unwrap()
    };
    let (wide, narrow) = (of(Precision::F32), of(Precision::Bf16));
    assert!(wide.breakdown.attention_s > 1.5 * narrow.breakdown.attention_s);
    // Parameters, gradients and two moments of four bytes each: no master copy.
    let states = wide.memory.weights + wide.memory.gradients + wide.memory.optimizer;
    assert!((states / model.parameters() as f64 - 16.0).abs() < 0.01);
}

#[test]
fn a_refined_price_is_the_simulation() {
    let (model, cluster, training, layout) = deepseek();
    let pricer = Pricer::new(&model, &cluster, &training);
    let close = |layout: &Parallelism, within: f64| {
        let refined = pricer.price_simulated(layout).unwrap();
        let simulated = pricer.simulate(layout, false).unwrap().simulated.seconds;
        assert!(
            (refined.step_s / simulated - 1.0).abs() < within,
            "{layout}: {} {simulated}",
            refined.step_s
        );
        assert!((refined.breakdown.total_s() - refined.step_s).abs() < 1e-9);
        let spread = |priced: &Priced| priced.interval_s[1] / priced.step_s;
        assert!((spread(&refined) - spread(&pricer.price(layout).unwrap())).abs() < 1e-12);
    };
    close(&layout, 1e-12);
    // 240 and more micro-batches on 8 ranks repeat themselves.
    for long in [
        "pp8 vp2 ep64 dp64 mb1 dualpipev zero1",
        "pp8 ep64 dp64 mb1 zb1p zero1",
        "pp8 ep64 dp64 mb1 1f1b zero1",
    ] {
        close(&long.parse().unwrap(), 1e-3);
    }
    close(&"pp8 vp4 ep64 dp64 mb1 interleaved zero1".parse().unwrap(), 1e-3);
}

#[test]
fn changes_are_what_repricing_says_and_come_best_first() {
    let (model, cluster, training, layout) = deepseek();
    let training = Training { compute: Precision::Bf16, ..training };
    let layout = Parallelism { recompute: Recomputation::Full, ..layout };
    let priced = Pricer::new(&model, &cluster, &training).price_simulated(&layout).unwrap();
    let found = changes(&model, &cluster, &layout, &training, 3);
    assert!(!found.is_empty() && found.len() <= 3);
    assert!(found.is_sorted_by(|a, b| a.saves >= b.saves));
    for change in &found {
        assert!(change.fits && change.saves > 0.0, "{}", change.what);
        assert!((1.0 - change.step.value / priced.step_s - change.saves).abs() < 1e-12);
    }
    let (what, share) = bottleneck(&priced);
    assert!(priced.breakdown.parts().iter().any(|(name, _)| *name == what) && share > 0.0 && share < 1.0);
}

#[test]
fn a_wider_inner_level_is_advised_only_where_the_next_one_holds_it() {
    let (model, cluster, training, layout) = deepseek();
    let layout = Parallelism { recompute: Recomputation::Full, ..layout };
    let advised = |inner: usize, middle: usize| {
        let mut cluster = cluster.clone();
        let outer = cluster.levels[1].clone();
        cluster.levels[0].width = inner;
        cluster.levels.insert(1, Level { name: "rail".into(), width: middle, ..outer });
        let found = changes(&model, &cluster, &layout, &training, usize::MAX);
        found.iter().any(|change| change.what.contains("over 64 GPUs"))
    };
    assert!(advised(8, 256));
    assert!(!advised(8, 32));
    assert!(!advised(66, 132));
}
