//! A search finds every feasible layout once, the same plans however it is cut, and no plan that another beats.

use std::collections::HashSet;

use unisono_plan::search::{Plan, Search};
use unisono_plan::{Architecture, Cluster, DispatchKind, Parallelism, Precision, Recomputation, Training};

fn training() -> Training {
    Training { global_batch: 256, dispatch: DispatchKind::default(), ..Training::default() }
}

fn search(gpus: &str) -> Search {
    let model = Architecture::built_in("Qwen3-30B-A3B").expect("a built-in model");
    Search::new(&model, &Cluster::parse(gpus).expect("a built-in GPU"), &training())
}

#[test]
fn layouts_are_distinct_and_feasible() {
    let search = search("h100x32");
    let model = Architecture::built_in("Qwen3-30B-A3B").expect("a built-in model");
    let layouts: Vec<Parallelism> = search.layouts().collect();
    let distinct: HashSet<&Parallelism> = layouts.iter().collect();
    assert_eq!(distinct.len(), layouts.len());
    for layout in &layouts {
        layout.check(&model, &training()).unwrap_or_else(|error| panic!("{layout:?}: {error}"));
        assert!([32, 16, 8].contains(&layout.gpus()));
        let again = layout.recompute.modules();
        assert!(!again.mla_up_projection && !again.mlp, "{layout}: the model has neither");
    }
}

#[test]
fn a_search_can_be_told_what_is_computed_again() {
    let search = search("h100x32");
    let recompute = Recomputation::SELECTIVE;
    let asked: Vec<Parallelism> = search.clone().recomputing(recompute).layouts().collect();
    // One of the four that are tried otherwise.
    assert_eq!(4 * asked.len(), search.layouts().count());
    assert!(asked.iter().all(|layout| layout.recompute == recompute));
}

#[test]
fn parts_of_a_search_together_are_the_whole() {
    let search = search("h100x16");
    let whole = search.run(0, 1);
    assert!(whole.feasible > 100 && whole.priced == search.layouts().count());
    let parts = (0..3).map(|part| search.run(part, 3)).reduce(|a, b| b.merge(a)).expect("three parts");
    assert_eq!(parts, whole);
}

#[test]
fn no_plan_of_the_front_is_beaten_by_any_layout_that_fits() {
    let search = search("h100x16");
    let found = search.run(0, 1);
    let cost = |plan: &Plan| (plan.priced.step_s, -plan.headroom_bytes, plan.run_usd);
    assert_eq!(found.front[0].priced.step_s, found.fastest[0].priced.step_s);
    for layout in search.layouts() {
        let priced = search.pricer().price(&layout).expect("feasible");
        let headroom = 80e9 - priced.memory.total();
        for plan in found.front.iter().filter(|_| priced.fits) {
            let (step_s, bytes, usd) = cost(plan);
            let own_usd = usd / (step_s * plan.layout.gpus() as f64) * priced.step_s * layout.gpus() as f64;
            let better = [priced.step_s < step_s, -headroom < bytes - 1e6, own_usd < usd * (1.0 - 1e-9)];
            assert!(!better.iter().all(|better| *better), "{layout:?} beats {:?}", plan.layout);
        }
    }
}

#[test]
fn what_is_left_out_before_pricing_would_not_have_fitted() {
    let model = Architecture::built_in("Mixtral-8x22B").expect("a built-in model");
    let cluster = Cluster::parse("h100x32").expect("a built-in GPU");
    let search = Search::new(&model, &cluster, &training());
    let priced: HashSet<Parallelism> = search.layouts().collect();
    let left_out = |expert| Parallelism { data: 32, expert, ..Parallelism::default() };
    for layout in [1, 2, 4].map(left_out) {
        assert!(!priced.contains(&layout));
        assert!(!search.pricer().price(&layout).expect("feasible").fits);
    }
}

#[test]
fn where_nothing_fits_the_nearest_layout_is_named() {
    let model = Architecture::built_in("DeepSeek-V3").expect("a built-in model");
    let cluster = Cluster::parse("h100x16").expect("a built-in GPU");
    let search = Search::new(&model, &cluster, &training());
    assert_eq!(search.run(0, 1).feasible, 0);
    let nearest = search.nearest().expect("there are layouts");
    assert!(nearest.headroom_bytes < 0.0 && !nearest.priced.fits);
    assert_eq!(nearest.layout.gpus(), 16, "fewer GPUs hold less");
}

/// Largest error of the price against the simulation among the best layouts, relative.
fn worst_error(model: &str, cluster: &str, training: &Training) -> f64 {
    let model = Architecture::built_in(model).expect("a built-in model");
    let cluster = Cluster::parse(cluster).expect("a built-in GPU");
    let search = Search::new(&model, &cluster, training);
    let found = search.run(0, 1);
    let error = |plan: &Plan| {
        let step = search.pricer().simulate(&plan.layout, false).expect("it was priced");
        (plan.priced.step_s / step.simulated.seconds - 1.0).abs()
    };
    assert_eq!(found.fastest.len(), 100);
    found.fastest.iter().map(error).fold(0.0, f64::max)
}

#[test]
fn prices_of_the_best_plans_are_within_5_percent_of_their_simulation() {
    let training = Training {
        global_batch: 15_360,
        compute: Precision::Fp8,
        wire: Precision::Fp8,
        dispatch: DispatchKind { deduplicated: true, overlapped: true, padded: false },
        ..training()
    };
    let error = worst_error("DeepSeek-V3", "h800x2048", &training);
    assert!(error < 0.05, "{error}");
    let training = Training { global_batch: 1152, ..self::training() };
    for (model, cluster) in [("GPT-OSS-120B", "gb200x576"), ("Llama-3.1-405B", "h100x2048")] {
        let error = worst_error(model, cluster, &training);
        assert!(error < 0.05, "{model} {cluster}: {error}");
    }
}

#[test]
fn a_refined_search_is_ordered_by_its_simulations() {
    let model = Architecture::built_in("Qwen3-235B-A22B").expect("a built-in model");
    let cluster = Cluster::parse("h100x512").expect("a built-in GPU");
    let search = Search::new(&model, &cluster, &Training { global_batch: 1152, ..training() });
    let found = search.run(0, 1);
    let refined = found.refined(found.plans().iter().map(|plan| search.refine(plan)).collect());
    assert_eq!((refined.priced, refined.feasible), (found.priced, found.feasible));
    assert_eq!(refined.fastest.len(), found.fastest.len());
    assert!(refined.fastest.is_sorted_by(|a, b| a.priced.step_s <= b.priced.step_s));
    let best = &refined.fastest[0];
    let step = search.pricer().simulate(&best.layout, false).expect("it was priced");
    assert!((best.priced.step_s / step.simulated.seconds - 1.0).abs() < 1e-3);
    // Uneven stages under DualPipeV: the closed form is far above what the schedule takes.
    assert!(best.priced.step_s < 0.95 * found.fastest[0].priced.step_s);
    for (place, plan) in refined.front.iter().enumerate() {
        let room = |other: &Plan| other.headroom_bytes < plan.headroom_bytes || other.run_usd > plan.run_usd;
        assert!(refined.front[..place].iter().all(room), "{}", plan.layout);
    }
}
