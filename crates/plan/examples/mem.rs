//! dev
use std::cell::RefCell;
use unisono_plan::{
    price,
    validate::{Prediction, validate_with},
};
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let text = std::fs::read_to_string(&a[1]).unwrap();
    let header = text.lines().next().unwrap();
    for line in text.lines().skip(1) {
        if !line.contains(&a[2]) {
            continue;
        }
        let seen = RefCell::new(String::new());
        let v = validate_with(&format!("{header}\n{line}\n"), None, &|m, c, l, t| {
            let p = price(m, c, l, t).ok()?;
            let parts: Vec<String> = p
                .memory
                .parts()
                .iter()
                .map(|(n, b)| format!("{} {:.3}", &n[..4], b / 1073741824.0))
                .collect();
            *seen.borrow_mut() = format!("L{} rank {} {}", m.layers, p.worst_rank, parts.join(" "));
            Prediction::of(&unisono_plan::Pricer::new(m, c, t), l)
        });
        let r = &v.rows[0];
        if let Some(m) = r.memory {
            let name = line.split(',').nth(5).unwrap();
            println!(
                "{} {:.2} | meas {:.3} pred {:.3} | {} | {} | {} | {}",
                r.id,
                m.predicted_gib / m.measured_gib,
                m.measured_gib,
                m.predicted_gib,
                seen.borrow(),
                r.plan,
                r.gpu,
                name
            );
        }
    }
}
