//! `unisono plan`

mod validate;

use clap::{Args, Subcommand};

use crate::error::CliError;

/// `unisono plan`
#[derive(Debug, Args)]
pub struct Plan {
    /// What to do
    #[command(subcommand)]
    command: PlanCommand,
}

/// The commands of the planner.
#[derive(Debug, Subcommand)]
enum PlanCommand {
    /// Hold the planner to published measurements
    Validate(validate::Validate),
}

/// `unisono plan`
pub fn run(args: Plan) -> Result<u8, CliError> {
    match args.command {
        PlanCommand::Validate(args) => validate::run(args),
    }
}
