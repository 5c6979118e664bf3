//! The command line of Unisono: arguments, terminal, exit codes. Everything else is the libraries'.

mod args;
mod bench;
mod bench_collectives;
mod bench_exchange;
mod bench_local;
mod bench_ways;
mod checkpoint;
mod compare;
mod config;
mod data;
mod diff;
mod doctor;
mod error;
mod eval;
mod generate;
mod job;
mod layout;
mod machine;
#[cfg(feature = "mpi")]
mod outlive;
mod plan;
mod plot;
mod rates;
mod screen;
mod signals;
mod style;
mod summary;
mod train;
mod verify;
mod watch;

use std::panic::AssertUnwindSafe;
use std::process::ExitCode;

use clap::Parser;

use crate::args::{Arguments, Command};
use crate::error::{BUG, CliError, STORAGE};

fn main() -> ExitCode {
    unisono_tensor::cpu::keep_freed_memory();
    let arguments = Arguments::parse();
    // What `train` prints is not its result.
    let prints_its_result = !matches!(arguments.command, Command::Train(_));
    // A panic has said where it was; what is left to say is whose fault it is.
    let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| run(arguments.command)));
    let outcome = outcome.unwrap_or_else(|_| {
        Err(CliError { code: BUG, message: "this is a defect of unisono: please report it".into() })
    });
    screen::flush();
    let outcome = outcome.and_then(|code| match screen::lost().filter(|_| prints_its_result) {
        None => Ok(code),
        Some(why) => {
            Err(CliError { code: STORAGE, message: format!("cannot write to standard output: {why}") })
        }
    });
    match outcome {
        Ok(code) => code.into(),
        Err(error) => {
            screen::complain("error", &error.message);
            error.code.into()
        }
    }
}

/// Runs a command; the number is the exit code.
fn run(command: Command) -> Result<u8, CliError> {
    if !command.can_be_one_of_several() {
        job::check_alone()?;
    }
    match command {
        Command::Train(args) => train::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Data(args) => data::run(args),
        Command::Checkpoint(args) => checkpoint::run(args),
        Command::Diff(args) => diff::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Verify(args) => verify::run(args),
        Command::Config(args) => config::run(&args),
        Command::Compare(args) => compare::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Plan(args) => plan::run(*args),
        #[cfg(feature = "mpi")]
        Command::Guard(args) => outlive::guard(&args),
    }
}
