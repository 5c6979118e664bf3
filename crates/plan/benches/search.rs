//! Priced plans a second on one core, and the whole search for DeepSeek-V3 on 2,048 H800.

use std::time::Instant;

use unisono_plan::search::{Plan, Search};
use unisono_plan::{Architecture, Cluster, Parallelism, Precision, Training};

fn training() -> Training {
    Training {
        global_batch: 15_360,
        tokens: 14.8e12,
        compute: Precision::Fp8,
        wire: Precision::Fp8,
        ..Training::default()
    }
}

/// Seconds that this thread has run on a core so far: unlike the time of day it does not count what others run.
fn core_s() -> f64 {
    let status = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = status.split_whitespace().next().and_then(|field| field.parse::<f64>().ok());
    nanoseconds.unwrap_or(0.0) / 1e9
}

/// A plan's price against its simulation, as a share.
fn error(search: &Search, plan: &Plan) -> f64 {
    let step = search.pricer().simulate(&plan.layout, false).expect("the layout was priced");
    plan.priced.step_s / step.simulated.seconds - 1.0
}

fn main() {
    let model = Architecture::built_in("DeepSeek-V3").expect("a built-in model");
    let cluster = Cluster::parse("h800x2048").expect("a built-in GPU");
    let search = Search::new(&model, &cluster, &training());
    let mut layouts: Vec<Parallelism> = search.layouts().collect();
    println!("{} layouts of {} on {} x {}", layouts.len(), model.name, cluster.gpus, cluster.gpu.name);
    layouts.retain(|layout| search.pricer().price(layout).is_ok_and(|priced| priced.fits));
    println!("{} of them fit", layouts.len());
    for round in 0..3 {
        let begin = core_s();
        let mut sum = 0.0;
        for layout in &layouts {
            sum += search.pricer().price(layout).map_or(0.0, |priced| priced.step_s);
        }
        let seconds = core_s() - begin;
        println!(
            "round {round}: {:.0} plans a second and core (sum of steps {sum:.3} s)",
            layouts.len() as f64 / seconds
        );
    }
    let begin = Instant::now();
    let (half, other) = std::thread::scope(|scope| {
        let other = scope.spawn(|| search.run(1, 2));
        (search.run(0, 2), other.join().expect("a search does not panic"))
    });
    let found = half.merge(other);
    println!(
        "search on 2 threads: {:.2} s, {} priced, {} fit, {} on the front",
        begin.elapsed().as_secs_f64(),
        found.priced,
        found.feasible,
        found.front.len()
    );
    let mut errors: Vec<f64> = found.fastest.iter().map(|plan| 100.0 * error(&search, plan)).collect();
    errors.sort_by(f64::total_cmp);
    let (count, most) = (errors.len(), errors[0].abs().max(errors[errors.len() - 1].abs()));
    println!(
        "best {count} against their simulation: {:+.2}% in the median, at most {most:.2}%",
        errors[count / 2]
    );
    for plan in found.fastest.iter().take(8) {
        let Parallelism {
            tensor, pipeline, virtual_stages, expert, expert_tensor, data, micro_batch, ..
        } = plan.layout;
        println!(
            "{:7.3} s  TP{tensor} PP{pipeline}x{virtual_stages} EP{expert} ETP{expert_tensor} DP{data} MB{micro_batch} {} {:?} {:?}  {:.1} GB left  ${:.2}M",
            plan.priced.step_s,
            plan.layout.schedule,
            plan.layout.sharding,
            plan.layout.recompute,
            plan.headroom_bytes / 1e9,
            plan.run_usd / 1e6,
        );
    }
}
