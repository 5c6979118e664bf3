//! What goes to the terminal: lines on stdout, complaints and the progress bar on stderr.

use std::io::{ErrorKind, IsTerminal, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, channel, sync_channel};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::style::Paint;

/// Before there is a bar.
const WAIT: &str = "{msg} ...";

/// Why something could not be written to stdout, the first time.
static LOST: OnceLock<String> = OnceLock::new();

/// Lines of a run that wait for a reader; while nobody reads (a launcher that ends a job, Ctrl-S), what comes on top of them
/// is dropped, so that the run goes on to its checkpoint.
const QUEUE: usize = 4096;
/// How long a complaint waits for lines that were before it.
const COURTESY: Duration = Duration::from_secs(1);

type Task = Box<dyn FnOnce() + Send>;

/// A thread that writes, since writing may block for as long as nobody reads.
struct Printer {
    tasks: SyncSender<Task>,
    dropped: AtomicU64,
}

static PRINTER: OnceLock<Option<Printer>> = OnceLock::new();

impl Printer {
    fn start(length: usize) -> Option<Self> {
        let (tasks, due) = sync_channel::<Task>(length);
        let write = move || due.into_iter().for_each(|task| task());
        std::thread::Builder::new().name("printer".into()).spawn(write).ok()?;
        Some(Self { tasks, dropped: AtomicU64::new(0) })
    }

    /// Writes in a moment, if there is room.
    fn queue(&self, write: impl FnOnce() + Send + 'static) {
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        let task = move || {
            if dropped > 0 {
                print(&format!("... {dropped} lines are not shown: nobody read them\n"));
            }
            write();
        };
        if self.tasks.try_send(Box::new(task)).is_err() {
            self.dropped.fetch_add(dropped + 1, Ordering::Relaxed);
        }
    }

    /// Waits until all is written, or for `limit`.
    fn flush(&self, limit: Option<Duration>) {
        let (done, written) = channel();
        let task: Task = Box::new(move || done.send(()).unwrap_or(()));
        match limit {
            // Neither fails while the thread lives; it ends with the process.
            None => drop(self.tasks.send(task).is_ok() && written.recv().is_ok()),
            Some(limit) => match self.tasks.try_send(task) {
                Ok(()) | Err(TrySendError::Disconnected(_)) => drop(written.recv_timeout(limit)),
                Err(TrySendError::Full(_)) => {}
            },
        }
    }
}

fn queue(write: impl FnOnce() + Send + 'static) {
    match PRINTER.get_or_init(|| Printer::start(QUEUE)) {
        Some(printer) => printer.queue(write),
        None => write(),
    }
}

/// Waits until the lines of a [`Screen`] are written.
pub fn flush() {
    flush_for(None);
}

fn flush_for(limit: Option<Duration>) {
    if let Some(Some(printer)) = PRINTER.get() {
        printer.flush(limit);
    }
}

/// Writes to stdout, behind the lines that wait.
pub fn say(text: &str) {
    flush();
    print(text);
}

/// A reader that has gone (`| head`) is no reason to end a run.
fn print(text: &str) {
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

/// Writes `label: message` to stderr, behind the lines that wait.
pub fn complain(label: &str, message: &str) {
    flush_for(Some(COURTESY));
    print_complaint(label, message);
}

fn print_complaint(label: &str, message: &str) {
    let stderr = std::io::stderr();
    let paint = Paint::new(&stderr);
    let label = if label == "error" { paint.red(label) } else { paint.yellow(label) };
    let _ = writeln!(stderr.lock(), "{label}: {message}");
}

/// Writes above the bar. While it writes, a bar that is shown cannot be moved; one that is not keeps nobody waiting.
fn above(bar: &ProgressBar, write: impl FnOnce()) {
    if bar.is_hidden() { write() } else { bar.suspend(write) }
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
        self.bar.tick();
    }

    fn style(&self, template: &str) {
        // The templates are constants of this crate, and `templates_are_valid` reads them all.
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        self.bar.set_style(style);
    }

    /// Sets how far it is, of what, and what is said about it.
    pub fn advance(&self, position: u64, length: u64, message: String) {
        self.bar.set_length(length);
        self.bar.set_message(message);
        self.bar.set_position(position);
    }

    /// Shows the bar, at `position`, and starts its clock.
    pub fn start(&self, position: u64, length: u64) {
        // What is set is drawn at once, so the bar comes last.
        self.bar.set_length(length);
        self.bar.set_position(position);
        self.bar.reset_eta();
        self.bar.reset_elapsed();
        self.style(self.template);
        self.bar.set_message("");
        self.bar.tick();
    }

    /// Writes a line above the bar, in a moment.
    pub fn line(&self, text: &str) {
        let (bar, text) = (self.bar.clone(), format!("{text}\n"));
        queue(move || above(&bar, || print(&text)));
    }

    /// Writes a complaint above the bar, in a moment.
    pub fn complain(&self, label: &str, message: &str) {
        let (bar, label, message) = (self.bar.clone(), label.to_owned(), message.to_owned());
        queue(move || above(&bar, || print_complaint(&label, &message)));
    }

    /// Takes the bar away, when all lines are written.
    pub fn finish(&self) {
        flush();
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use indicatif::ProgressStyle;

    use super::Printer;

    #[test]
    fn while_nobody_reads_lines_wait_and_then_are_dropped_and_counted() {
        let printer = Printer::start(2).unwrap();
        let ((reads, read), (shown, lines)) = (channel(), channel());
        printer.queue(move || read.recv().unwrap());
        for line in 0..9 {
            let shown = shown.clone();
            printer.queue(move || shown.send(line).unwrap());
        }
        printer.flush(Some(Duration::from_millis(1)));
        let dropped = printer.dropped.load(std::sync::atomic::Ordering::Relaxed);
        assert!((7..=8).contains(&dropped), "two are kept, one of which may block: {dropped}");
        reads.send(()).unwrap();
        printer.flush(None);
        assert_eq!(lines.try_iter().count() as u64, 9 - dropped);
        printer.queue(move || shown.send(9).unwrap());
        printer.flush(None);
        assert_eq!(lines.try_iter().collect::<Vec<_>>(), [9]);
    }

    #[test]
    fn templates_are_valid() {
        for template in [
            super::WAIT,
            crate::train::BAR,
            crate::data::BAR,
            crate::verify::BAR,
            crate::compare::BAR,
            crate::plan::answer::BAR,
            crate::plan::answer::TRIALS_BAR,
            crate::plan::trace::BAR,
        ] {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }
}
