//! A run's outlook, its bytes by link and what would help, against published facts and formulas.

use unisono_plan::collectives::places_touched;
use unisono_plan::{
    Architecture, Axis, Cluster, DispatchKind, Optimizer, Outlook, Parallelism, Precision, Pricer,
    Recomputation, Routing, Software, Trainable, Training, bottleneck, changes,
};

/// DeepSeek-V3's pre-training: 15,360 sequences of 4,096 tokens a step, 14.8 T tokens.
fn deepseek() -> (Architecture, Cluster, Training, Parallelism) {
    let training = Training {
        sequence: 4096,
        global_batch: 15_360,
        tokens: 14.8e12,
        compute: Precision::Fp8,
        wire: Precision::Fp8,
        optimizer: Optimizer { moments: Precision::Bf16, ..Optimizer::default() },
        routing: Routing::Balanced,
        dispatch: DispatchKind { deduplicated: true, overlapped: true },
        trainable: Trainable::All,
        software: Software::default(),
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
    let outlook = Outlook::of(&priced, &cluster, &layout, &training);
    // The report: 2.664 M H800 hours, 180 K a trillion tokens, $2 each.
    assert!((outlook.gpu_hours / 2.664e6 - 1.0).abs() < 0.005, "{}", outlook.gpu_hours);
    assert!((outlook.gpu_hours_per_trillion(&training) / 180e3 - 1.0).abs() < 0.01);
    assert!((outlook.usd_without_failures / 5.328e6 - 1.0).abs() < 0.005);
    assert!(outlook.goodput > 0.9 && outlook.goodput < 1.0);
    assert!((outlook.usd * outlook.goodput / outlook.usd_without_failures - 1.0).abs() < 1e-12);
    let young = (2.0 * outlook.checkpoint_s * outlook.failure_every_s).sqrt();
    assert_eq!(outlook.checkpoint_every_s, young);
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
        assert_eq!(outlook.failures_are_rare, rare, "a failure every {} s", outlook.failure_every_s);
    }
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
    // 31 boundaries between 32 chunks, both ways.
    let message = 2.0 * 4096.0 * 7168.0;
    assert_eq!(traffic.bytes[Axis::Pipeline as usize], [0.0, 120.0 * message * 2.0 * 31.0 / 16.0]);
    assert_eq!(traffic.of_level(1), traffic.bytes.iter().map(|levels| levels[1]).sum::<f64>());
}

#[test]
fn changes_are_what_repricing_says_and_come_best_first() {
    let (model, cluster, training, layout) = deepseek();
    let training = Training { compute: Precision::Bf16, ..training };
    let layout = Parallelism { recompute: Recomputation::Full, ..layout };
    let priced = Pricer::new(&model, &cluster, &training).price(&layout).unwrap();
    let found = changes(&model, &cluster, &layout, &training, 3);
    assert!(!found.is_empty() && found.len() <= 3);
    assert!(found.is_sorted_by(|a, b| a.saves >= b.saves));
    for change in &found {
        assert!(change.fits && change.saves > 0.0, "{}", change.what);
        assert!((1.0 - change.step_s / priced.step_s - change.saves).abs() < 1e-12);
    }
    let (what, share) = bottleneck(&priced);
    assert!(priced.breakdown.parts().iter().any(|(name, _)| *name == what) && share > 0.0 && share < 1.0);
}
