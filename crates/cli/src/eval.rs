//! `unisono eval`

use unisono_train::evaluate;

use crate::args::Eval;
use crate::error::{CliError, DONE};
use crate::generate::open;
use crate::layout::ranks_and_threads;
use crate::screen::say;
use crate::style::grouped;

/// `unisono eval`
pub fn run(args: Eval) -> Result<u8, CliError> {
    let opened = open(&args.run, args.step)?;
    let config = opened.config();
    let (ranks, threads) = ranks_and_threads(config.grid.slots(), args.ranks, args.threads);
    let sequences = args.sequences.unwrap_or(config.evaluation.sequences);
    let Some(record) = evaluate(&opened, ranks, threads, sequences)? else {
        return Err(CliError::usage(format!(
            "the run's dataset has no validation sequence of {} tokens: prepare it with --validation above 0",
            config.train.sequence_length
        )));
    };
    if args.json {
        let json = serde_json::json!({
            "step": record.validation_step,
            "loss": record.loss,
            "bits_per_byte": record.bits_per_byte,
            "tokens": record.tokens,
        });
        say(&format!("{json}\n"));
    } else {
        say(&format!(
            "step {}: validation loss {:.4} nats, {:.3} bits/byte, perplexity {:.2}, over {} tokens\n",
            record.validation_step,
            record.loss,
            record.bits_per_byte,
            record.loss.exp(),
            grouped(record.tokens)
        ));
    }
    Ok(DONE)
}
