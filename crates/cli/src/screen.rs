//! What goes to the terminal: lines on stdout, complaints and the progress bar on stderr.

use std::io::{ErrorKind, IsTerminal, Write};
use std::sync::OnceLock;

use indicatif::{ProgressBar, ProgressStyle};

use crate::style::Paint;

/// Before there is a bar.
const WAIT: &str = "{msg} ...";

/// Why something could not be written to stdout, the first time.
static LOST: OnceLock<String> = OnceLock::new();

/// Writes to stdout. A reader that has gone (`| head`) is no reason to end a run, nor is a disk that is full.
pub fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => drop(LOST.set(error.to_string())),
        _ => {}
    }
}

/// Why not all that was said has arrived on stdout; none if its reader has gone.
pub fn lost() -> Option<&'static str> {
    LOST.get().map(String::as_str)
}

/// Writes `label: message` to stderr.
pub fn complain(label: &str, message: &str) {
    let stderr = std::io::stderr();
    let paint = Paint::new(&stderr);
    let label = if label == "error" { paint.red(label) } else { paint.yellow(label) };
    let _ = writeln!(stderr.lock(), "{label}: {message}");
}

/// Lines, and on a terminal a progress bar below them.
#[derive(Debug)]
pub struct Screen {
    bar: ProgressBar,
    template: &'static str,
    /// Colours for lines.
    pub paint: Paint,
}

impl Screen {
    /// A screen whose bar looks as `template` says once it is started; without a terminal there is none, and no control
    /// codes.
    pub fn new(template: &'static str) -> Self {
        let bar = if std::io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
        Self { bar, template, paint: Paint::new(&std::io::stdout()) }
    }

    /// Says what is being waited for before there is a bar.
    pub fn wait(&self, what: &'static str) {
        self.style(WAIT);
        self.bar.set_message(what);
    }

    fn style(&self, template: &str) {
        // The templates are constants of this crate, and `templates_are_valid` reads them all.
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        self.bar.set_style(style);
        self.bar.tick();
    }

    /// Sets how far it is, of what, and what is said about it.
    pub fn advance(&self, position: u64, length: u64, message: String) {
        self.bar.set_length(length);
        self.bar.set_message(message);
        self.bar.set_position(position);
    }

    /// Shows the bar, at `position`, and starts its clock.
    pub fn start(&self, position: u64, length: u64) {
        self.bar.set_message("");
        self.style(self.template);
        self.bar.set_length(length);
        self.bar.set_position(position);
        self.bar.reset_eta();
        self.bar.reset_elapsed();
    }

    /// Writes a line above the bar.
    pub fn line(&self, text: &str) {
        self.bar.suspend(|| say(&format!("{text}\n")));
    }

    /// Writes a complaint above the bar.
    pub fn complain(&self, label: &str, message: &str) {
        self.bar.suspend(|| complain(label, message));
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use indicatif::ProgressStyle;

    #[test]
    fn templates_are_valid() {
        for template in
            [super::WAIT, crate::train::BAR, crate::data::BAR, crate::verify::BAR, crate::plan::answer::BAR]
        {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }
}
