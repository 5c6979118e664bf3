//! `unisono doctor`: which rank died or was late, at which step and call, and who waited for it.

use std::path::Path;

use serde_json::{Value, json};
use unisono_comm::watch::{Identity, Records, Verdict, diagnose, in_time, read_records};
use unisono_comm::{Diagnosis, FlightRecord, Reason};
use unisono_train::Summary;
use unisono_train::run_folder::{
    CONFIG_FILE, FLIGHT, holds_a_run, read_config, read_identity, read_last_step, read_summary,
};

use crate::args::Doctor;
use crate::error::{CliError, DIFFERENT, DONE};
use crate::screen::say;
use crate::style::duration;

/// More ranks are counted, not listed.
const LISTED: usize = 16;

/// How the last start of a run ended, as far as its folder tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// After its last step, or where it was told to stop.
    Ended,
    /// A rank failed.
    Failed,
    /// The watchdog ended it.
    Stalled,
    /// It was told to stop and did not come to its end.
    Terminated,
    /// No rank left a record: it still goes, or all of it was killed.
    Unknown,
}

/// All that a run folder tells.
struct Report {
    outcome: Outcome,
    identity: Identity,
    last_step: Option<u64>,
    steps: Option<u64>,
    /// How many ranks it had, if a record says so.
    ranks: Option<usize>,
    records: Vec<FlightRecord>,
    /// Ranks without a record of this start.
    missing: Vec<usize>,
    /// Files that could not be used, and why.
    problems: Vec<String>,
    diagnosis: Diagnosis,
}

/// `unisono doctor`
pub fn run(args: &Doctor) -> Result<u8, CliError> {
    let folder = &args.run;
    if !holds_a_run(folder) && !folder.join(FLIGHT).is_dir() {
        return Err(CliError::no_run(folder));
    }
    let report = Report::new(folder)?;
    if args.json {
        say(&format!("{}\n", report.json()));
    } else {
        say(&report.render(folder));
    }
    Ok(if report.outcome == Outcome::Ended { DONE } else { DIFFERENT })
}

/// What a file says; what is wrong with it becomes a problem.
fn noted<T>(outcome: Result<Option<T>, unisono_train::TrainError>, problems: &mut Vec<String>) -> Option<T> {
    outcome.unwrap_or_else(|error| {
        problems.push(error.to_string());
        None
    })
}

impl Report {
    fn new(folder: &Path) -> Result<Self, CliError> {
        let found =
            read_records(&folder.join(FLIGHT)).map_err(|error| CliError::bad_input(error.to_string()))?;
        let mut problems = Vec::new();
        let config = folder.join(CONFIG_FILE).exists().then(|| read_config(folder)).transpose();
        let steps = noted(config, &mut problems).map(|config| config.train.steps);
        let identity = noted(read_identity(folder), &mut problems);
        let identity = identity.map(|found| Identity { run_id: found.run_id, epoch: found.epoch });
        let identity = identity.or_else(|| newest(&found.records)).unwrap_or_default();
        let summary = noted(read_summary(folder), &mut problems);
        let last_step = noted(read_last_step(folder), &mut problems);
        let (records, ranks) = select(found, &identity, &mut problems);
        let known = |rank: &usize| records.binary_search_by_key(rank, |record| record.rank).is_ok();
        let missing = (0..ranks.unwrap_or(0)).filter(|rank| !known(rank)).collect();
        let diagnosis = diagnose(&records);
        Ok(Self {
            outcome: outcome(summary.as_ref(), &identity, &records, &diagnosis),
            diagnosis,
            identity,
            last_step,
            steps,
            ranks,
            records,
            missing,
            problems,
        })
    }

    fn json(&self) -> Value {
        json!({
            "outcome": self.outcome.name(),
            "run": self.identity,
            "last_step": self.last_step,
            "steps": self.steps,
            "ranks": self.ranks,
            "records": self.records.iter().map(|record| record.rank).collect::<Vec<_>>(),
            "missing": self.missing,
            "culprits": self.diagnosis.culprits,
            "waiting": self.diagnosis.waiting,
            "problems": self.problems,
        })
    }

    fn render(&self, folder: &Path) -> String {
        let steps = self.steps.map(|steps| format!(" of {steps}")).unwrap_or_default();
        let step = self
            .last_step
            .map_or_else(|| "before its first step".into(), |step| format!("after step {step}{steps}"));
        let mut lines = vec![format!(
            "{}: start {}, {}",
            folder.display(),
            self.identity.epoch,
            self.outcome.says(&step)
        )];
        if self.outcome != Outcome::Ended {
            lines.extend(self.diagnosis.culprits.iter().map(|culprit| format!("  {culprit}")));
            lines.extend(self.diagnosis.waiting_lines().iter().map(|line| format!("  {line}")));
            lines.push(self.records_line());
        }
        lines.extend(self.problems.iter().map(|problem| format!("  not used: {problem}")));
        lines.push(String::new());
        lines.join("\n")
    }

    fn records_line(&self) -> String {
        let Some(ranks) = self.ranks else { return "  flight records: none of this start".into() };
        let mut line = format!("  flight records: {} of {ranks} ranks", self.records.len());
        let times = || self.records.iter().map(|record| record.written_us);
        if let (Some(first), Some(last)) = (times().min(), times().max()) {
            let at = i64::try_from(last).ok().and_then(|us| jiff::Timestamp::from_microsecond(us).ok());
            line.push_str(&at.map(|at| format!(", the last of {at:.0}")).unwrap_or_default());
            line.push_str(&format!(", written within {}", duration((last - first) as f64 / 1e6)));
        }
        if !self.missing.is_empty() {
            let listed: Vec<String> = self.missing.iter().take(LISTED).map(usize::to_string).collect();
            let more = self.missing.len().saturating_sub(LISTED);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            line.push_str(&format!("; none of {}{more}", listed.join(", ")));
        }
        if self.records.iter().any(|record| record.reason == Reason::Killed) {
            line.push_str("; of killed ranks as they were a moment before");
        }
        line
    }
}

/// The start that the newest record belongs to.
fn newest(records: &[FlightRecord]) -> Option<Identity> {
    records.iter().max_by_key(|record| record.written_us).map(|record| record.run.clone())
}

/// The records of this start, by rank, and how many ranks it had. The others become problems.
fn select(
    found: Records,
    identity: &Identity,
    problems: &mut Vec<String>,
) -> (Vec<FlightRecord>, Option<usize>) {
    problems.extend(found.damaged.into_iter().map(|damaged| damaged.problem));
    let (of_this, others): (Vec<_>, Vec<_>) =
        found.records.into_iter().partition(|record| record.run == *identity);
    for record in others {
        let (rank, run) = (record.rank, record.run);
        problems.push(format!("the record of rank {rank} is of start {} of run {}", run.epoch, run.run_id));
    }
    let ranks = of_this.iter().max_by_key(|record| record.written_us).map(|record| record.ranks);
    let (of_this, others): (Vec<_>, Vec<_>) =
        of_this.into_iter().partition(|record| Some(record.ranks) == ranks);
    for record in others {
        problems.push(format!("the record of rank {} is of a run of {} ranks", record.rank, record.ranks));
    }
    let in_time = in_time(&of_this);
    let (of_this, late): (Vec<_>, Vec<_>) = of_this.into_iter().partition(in_time);
    for record in late {
        problems.push(format!(
            "the record of rank {} came when the watchdog had ended the run: the rank was stopped, or woken to be killed",
            record.rank
        ));
    }
    (of_this, ranks)
}

fn outcome(
    summary: Option<&Summary>,
    identity: &Identity,
    records: &[FlightRecord],
    diagnosis: &Diagnosis,
) -> Outcome {
    if summary.is_some_and(|summary| summary.epoch == identity.epoch) {
        return Outcome::Ended;
    }
    let any = |is: fn(&Reason) -> bool| records.iter().any(|record| is(&record.reason));
    let failed = diagnosis.culprits.iter().any(|culprit| matches!(culprit.verdict, Verdict::Failed { .. }));
    if failed {
        Outcome::Failed
    } else if any(|reason| *reason == Reason::Stalled) {
        Outcome::Stalled
    } else if any(|reason| *reason == Reason::Terminated) {
        Outcome::Terminated
    } else {
        Outcome::Unknown
    }
}

impl Outcome {
    fn name(self) -> &'static str {
        match self {
            Self::Ended => "ended",
            Self::Failed => "failed",
            Self::Stalled => "stalled",
            Self::Terminated => "terminated",
            Self::Unknown => "unknown",
        }
    }

    fn says(self, step: &str) -> String {
        match self {
            Self::Ended => format!("ended well {step}"),
            Self::Failed => format!("failed {step}"),
            Self::Stalled => format!("ended by the watchdog {step}"),
            Self::Terminated => format!("told to stop {step}, and it did not come to its end"),
            Self::Unknown => format!(
                "{step}: no rank left a flight record, so it still goes, or all of it was killed at once (kill -9, out of \
                 memory, power)"
            ),
        }
    }
}
