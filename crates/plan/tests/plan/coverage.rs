//! How many measurements lie within the spread that is said of a table.

/// Standard deviations of a normal variable on either side of its mean between which it lies four times of five.
const FOUR_OF_FIVE: f64 = 1.2816;

/// Holds the share of `ratios` (predicted over measured, of rows left out of a table) within `spread`, the standard deviation of their
/// logarithms that is said of it, to 79 to 82%.
pub fn holds_four_of_five(name: &str, ratios: &[f64], spread: f64) {
    let mut apart: Vec<f64> = ratios.iter().map(|ratio| ratio.ln().abs()).collect();
    apart.sort_by(f64::total_cmp);
    let inside = apart.partition_point(|apart| *apart <= FOUR_OF_FIVE * spread);
    let share = inside as f64 / apart.len() as f64;
    let would = apart[apart.len() * 4 / 5] / FOUR_OF_FIVE;
    println!("{name}: {:.1}% of {} inside, {would:.3} would hold 80%", 100.0 * share, apart.len());
    assert!((0.79..=0.82).contains(&share), "{name}: {share:.3}");
}
