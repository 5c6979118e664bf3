//! Small line plots as SVG.

use std::fmt::Write;

/// One plot: lines over sizes on a logarithmic axis.
pub struct Panel {
    /// What it shows.
    pub title: String,
    /// Name and points `(x, y)` of each line.
    pub lines: Vec<(String, Vec<(f64, f64)>)>,
}

const COLOURS: [&str; 4] = ["#1b6ca8", "#c0504d", "#8a8a8a", "#5b8c5a"];
const WIDTH: f64 = 320.0;
const HEIGHT: f64 = 220.0;
/// Left, right, above and below the lines.
const MARGIN: (f64, f64, f64, f64) = (48.0, 12.0, 30.0, 34.0);

/// Panels side by side, three a row. `x_label` turns a place on the x axis into words.
pub fn svg(panels: &[Panel], y_title: &str, x_label: fn(f64) -> String) -> String {
    let columns = panels.len().clamp(1, 3);
    let (width, height) = (WIDTH * columns as f64, HEIGHT * panels.len().div_ceil(columns) as f64 + 24.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for (index, panel) in panels.iter().enumerate() {
        let (x, y) = ((index % columns) as f64 * WIDTH, (index / columns) as f64 * HEIGHT);
        let _ = writeln!(out, "<g transform=\"translate({x},{y})\">");
        draw(&mut out, panel, y_title, x_label);
        out.push_str("</g>\n");
    }
    let names = panels.first().map(|panel| panel.lines.as_slice()).unwrap_or_default();
    for (index, (name, _)) in names.iter().enumerate() {
        let (x, y, colour) = (MARGIN.0 + 200.0 * index as f64, height - 8.0, COLOURS[index % COLOURS.len()]);
        let _ = writeln!(
            out,
            "<line x1=\"{x}\" x2=\"{}\" y1=\"{}\" y2=\"{}\" stroke=\"{colour}\" stroke-width=\"2\"/><text x=\"{}\" \
             y=\"{y}\">{}</text>",
            x + 20.0,
            y - 4.0,
            y - 4.0,
            x + 26.0,
            escaped(name)
        );
    }
    out + "</svg>\n"
}

fn draw(out: &mut String, panel: &Panel, y_title: &str, x_label: fn(f64) -> String) {
    let (left, right, above, below) = MARGIN;
    let points = || panel.lines.iter().flat_map(|(_, points)| points);
    let (least, most) =
        points().fold((f64::MAX, f64::MIN), |(least, most), (x, _)| (least.min(x.ln()), most.max(x.ln())));
    let top = points().fold(f64::MIN_POSITIVE, |top, (_, y)| top.max(*y)) * 1.05;
    let across = |x: f64| left + (x.ln() - least) / (most - least).max(1e-9) * (WIDTH - left - right);
    let up = |y: f64| HEIGHT - below - y / top * (HEIGHT - above - below);
    let title = escaped(&panel.title);
    let _ = writeln!(
        out,
        "<text x=\"{left}\" y=\"18\" font-weight=\"bold\">{title}, {}</text>",
        escaped(y_title)
    );
    for tick in 0..=4 {
        let value = top * f64::from(tick) / 4.0;
        let y = up(value);
        let _ = writeln!(
            out,
            "<line x1=\"{left}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/><text x=\"{}\" y=\"{:.1}\" \
             text-anchor=\"end\">{value:.1}</text>",
            WIDTH - right,
            left - 4.0,
            y + 4.0
        );
    }
    if let Some((_, points)) = panel.lines.first() {
        for (x, _) in points {
            let (place, y) = (across(*x), HEIGHT - below + 14.0);
            let _ = writeln!(
                out,
                "<text x=\"{place:.1}\" y=\"{y}\" text-anchor=\"middle\">{}</text>",
                escaped(&x_label(*x))
            );
        }
    }
    for (index, (_, points)) in panel.lines.iter().enumerate() {
        let path: Vec<String> =
            points.iter().map(|(x, y)| format!("{:.1},{:.1}", across(*x), up(*y))).collect();
        let colour = COLOURS[index % COLOURS.len()];
        let path = path.join(" ");
        let _ = writeln!(
            out,
            "<polyline points=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>"
        );
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_drawn_inside_its_panel() {
        let line = |name: &str, scale: f64| (name.to_string(), vec![(1.0, scale), (1024.0, 3.0 * scale)]);
        let panel = || Panel { title: "a<b".into(), lines: vec![line("ours", 1.0), line("MPI", 2.0)] };
        let text = svg(&[panel(), panel(), panel(), panel()], "GB/s", |x| format!("{x}"));
        assert_eq!(text.matches("<polyline").count(), 8);
        assert!(text.contains("a&lt;b, GB/s") && !text.contains("a<b"));
        for pair in text.split("points=\"").skip(1).filter_map(|rest| rest.split('"').next()) {
            for point in pair.split(' ') {
                let (x, y) = point.split_once(',').unwrap();
                let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
                assert!((0.0..=WIDTH).contains(&x) && (0.0..=HEIGHT).contains(&y), "{point}");
            }
        }
    }
}
