//! Rates of exchanges next to memory copies and to the MPI library's own: as a table, as JSON, drawn.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};
use unisono_comm::Place;
use unisono_comm::bench::Native;

use crate::error::{CliError, STORAGE};
use crate::plot::{Panel, svg};
use crate::screen::say;
use crate::style::table;

/// Where rates go.
#[derive(Debug, Args)]
pub struct Output {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Draw the bandwidths into this SVG file
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

/// The MPI library's own, where ranks are its processes.
pub fn native_of(place: &Place) -> Option<&dyn Native> {
    match place {
        Place::Threads => None,
        #[cfg(feature = "mpi")]
        Place::Mpi(ranks) => Some(&**ranks),
    }
}

/// What was measured of one exchange.
pub struct Rate {
    /// The plot that it is in, and where on its axis.
    pub panel: (String, f64),
    /// What it is, in a table's words.
    pub cells: [String; 2],
    /// The same by name.
    pub entry: Value,
    /// Bytes of the exchange.
    pub bytes: usize,
    /// Those of them that count for its rate.
    pub moved: f64,
    /// Seconds, ours.
    pub ours_s: f64,
    /// Seconds that memory copies of as much take.
    pub copy_s: f64,
    /// Seconds of the library's own.
    pub native_s: Option<f64>,
}

/// What is said of the rates of one command.
pub struct Sheet {
    /// Heads of a rate's cells, and of the rate.
    pub heads: [&'static str; 3],
    /// Head of the library's rate.
    pub native_head: &'static str,
    /// What the library's own is called where it is drawn.
    pub native_line: String,
    /// What plots show.
    pub title: &'static str,
    /// Their axis in words.
    pub label: fn(f64) -> String,
    /// The object that rates are printed in as JSON, under `list`.
    pub object: Value,
    /// See `object`.
    pub list: &'static str,
    /// What stands below the table.
    pub note: Option<&'static str>,
}

impl Rate {
    fn gb_per_s(&self, seconds: f64) -> f64 {
        self.moved / seconds / 1e9
    }

    fn json(&self) -> Value {
        let mut entry = self.entry.clone();
        entry["bytes"] = json!(self.bytes);
        entry["gb_per_s"] = json!(self.gb_per_s(self.ours_s));
        entry["copy_gb_per_s"] = json!(self.gb_per_s(self.copy_s));
        entry["native_gb_per_s"] = json!(self.native_s.map(|seconds| self.gb_per_s(seconds)));
        entry["of_native"] = json!(self.native_s.map(|seconds| seconds / self.ours_s));
        entry
    }

    fn line(&self) -> Vec<String> {
        let rate = |seconds: f64| format!("{:.2}", self.gb_per_s(seconds));
        let mut line = self.cells.to_vec();
        line.extend([
            format!("{:.2}", self.bytes as f64 / f64::from(1 << 20)),
            rate(self.ours_s),
            format!("{:.0}%", 100.0 * self.copy_s / self.ours_s),
        ]);
        let native = self.native_s.map(|seconds| [rate(seconds), format!("{:.2}", seconds / self.ours_s)]);
        line.extend(native.into_iter().flatten());
        line
    }
}

impl Sheet {
    /// Draws and prints.
    ///
    /// # Errors
    /// If the plot cannot be written.
    pub fn show(mut self, output: &Output, rates: &[Rate]) -> Result<(), CliError> {
        if let Some(path) = &output.plot {
            let error = |error| CliError {
                code: STORAGE,
                message: format!("cannot write {}: {error}", path.display()),
            };
            std::fs::write(path, self.plot(rates)).map_err(error)?;
        }
        if output.json {
            self.object[self.list] = rates.iter().map(Rate::json).collect();
            say(&format!("{}\n", self.object));
            return Ok(());
        }
        let [first, second, rate] = self.heads;
        let mut heads = vec![first, second, "MiB", rate, "of memory copies"];
        if rates.iter().any(|rate| rate.native_s.is_some()) {
            heads.extend([self.native_head, "ours / MPI's"]);
        }
        let mut lines: Vec<Vec<String>> = vec![heads.into_iter().map(String::from).collect()];
        lines.extend(rates.iter().map(Rate::line));
        let mut lines = table(&lines, 1);
        lines.extend(self.note.map(String::from));
        say(&(lines.join("\n") + "\n"));
        Ok(())
    }

    fn plot(&self, rates: &[Rate]) -> String {
        let mut panels: Vec<Panel> = Vec::new();
        for rate in rates {
            let (title, place) = &rate.panel;
            let at = panels.iter().position(|panel| panel.title == *title).unwrap_or_else(|| {
                let names = ["unisono", "memory copies", &self.native_line];
                let lines = names.iter().take(2 + usize::from(rate.native_s.is_some()));
                let lines = lines.map(|name| ((*name).to_string(), Vec::new())).collect();
                panels.push(Panel { title: title.clone(), lines });
                panels.len() - 1
            });
            let times = [Some(rate.ours_s), Some(rate.copy_s), rate.native_s];
            for ((_, points), seconds) in panels[at].lines.iter_mut().zip(times.into_iter().flatten()) {
                points.push((*place, rate.gb_per_s(seconds)));
            }
        }
        svg(&panels, self.title, self.label)
    }
}
