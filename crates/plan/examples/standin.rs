//! dev
use unisono_plan::validate::validate;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let text = std::fs::read_to_string(&a[1]).unwrap();
    let t = std::time::Instant::now();
    let v = validate(&text, None);
    eprintln!("{:?}", t.elapsed());
    for (r, n) in &v.skipped {
        println!("{n} {r}");
    }
    let p = |f: Option<f64>| f.map_or("-".into(), |f| format!("{:.1}", 100.0 * f));
    for k in v.families.iter().chain(&v.kinds).chain([&v.all]) {
        println!(
            "{:60} {:4} plain {} bias {} cov {} w {} | rel {} {} {} {} | base {} tau {} | mem {} {} {}",
            k.name,
            k.timed,
            p(k.plain.map(|x| x.mape)),
            p(k.plain.map(|x| x.bias)),
            p(k.plain.map(|x| x.coverage)),
            p(k.plain.map(|x| x.width)),
            p(k.released.map(|x| x.mape)),
            p(k.released.map(|x| x.bias)),
            p(k.released.map(|x| x.coverage)),
            p(k.released.map(|x| x.width)),
            p(k.baseline_mape),
            p(k.tau),
            k.weighed,
            p(k.memory_mape),
            p(k.memory_bias)
        );
    }
    println!("baseline rows {:?}", v.baseline_mape_of_rows);
    if a.len() > 2 {
        for r in &v.rows {
            if r.file.contains(&a[2]) {
                println!(
                    "{} {} {} {} {} | {} | {:?} mem {:?} {:?}",
                    r.id,
                    r.framework,
                    r.model,
                    r.gpu,
                    r.precision,
                    r.plan,
                    r.time.map(|t| (t.measured_s, t.predicted_s, t.predicted_s / t.measured_s)),
                    r.memory.map(|m| (m.measured_gib, m.predicted_gib)),
                    r.skipped
                );
            }
        }
    }
}
