//! The contract checked for one layout: a few steps with the reference layout and with this one, to the same bits.

use std::path::{Path, PathBuf};

use unisono_comm::Place;
use unisono_data::Dataset;
use unisono_mesh::Fold;

use crate::comparison::Comparison;
use crate::config::{LayoutConfig, RunConfig};
use crate::error::TrainError;
use crate::memory::check_fits;
use crate::record::{Event, Observer};
use crate::run::{RunOptions, check_nodes, open_dataset, train_on};

/// The folder of the reference run, in that of a verification.
pub fn reference_folder(folder: &Path) -> PathBuf {
    folder.join("reference")
}

/// The folder of the run that is verified, in that of a verification.
pub fn verified_folder(folder: &Path) -> PathBuf {
    folder.join("verified")
}

/// Trains `steps` steps of `config` twice, below `options.folder`: with one rank, everything folded onto it and the default
/// `[layout]`, and as `options` and the config's `[layout]` say. Says what differs: losses, gradient norm and routing
/// counts of every step; parameters, both moments and balance bias after every step; the last checkpoint, by element. Only
/// the process of rank 0 makes the reference run and compares; others get None.
///
/// # Errors
/// If one of the two does not fit into memory or cannot be trained.
pub fn verify(
    config: &RunConfig,
    steps: u64,
    options: &RunOptions,
    observer: &dyn Observer,
) -> Result<Option<Comparison>, TrainError> {
    config.validate()?;
    check_nodes(&options.nodes, options.ranks)?;
    let fits = |config: &RunConfig, node_of: &[usize], place: &Place| {
        let fold = Fold::new(config.grid, node_of.len())?;
        check_fits(config, &fold, node_of, place)
    };
    if options.place.leads() {
        fits(&reference(config), &[0], &Place::Threads)?;
    }
    fits(config, &options.node_of(), &options.place)?;
    let dataset = open_dataset(config, options.ranks * options.threads)?;
    verify_on(config, steps, options, &dataset, observer)
}

/// [`verify`] on a dataset that is open already.
///
/// # Errors
/// As [`verify`].
pub fn verify_on(
    config: &RunConfig,
    steps: u64,
    options: &RunOptions,
    dataset: &Dataset,
    observer: &dyn Observer,
) -> Result<Option<Comparison>, TrainError> {
    let config = watched(config, steps);
    let folder = &options.folder;
    let leads = options.place.leads();
    let threads = options.place.ranks_here(options.ranks) * options.threads;
    let mut alone = RunOptions::new(reference_folder(folder), 1, threads);
    (alone.stop_after, alone.abandon) = (Some(steps), options.abandon);
    if leads {
        let beating = Beating { place: &options.place, observer };
        train_on(&reference(&config), &alone, dataset, &beating)?;
    }
    let together = RunOptions { folder: verified_folder(folder), stop_after: Some(steps), ..options.clone() };
    train_on(&config, &together, dataset, observer)?;
    leads.then(|| Comparison::new(&alone.folder, &together.folder)).transpose()
}

/// Tells the other processes with every event that this one gets on.
struct Beating<'a> {
    place: &'a Place,
    observer: &'a dyn Observer,
}

impl Observer for Beating<'_> {
    fn event(&self, event: Event) {
        self.place.beat();
        self.observer.event(event);
    }

    fn stop(&self) -> bool {
        self.observer.stop()
    }
}

/// The same computation, laid out as nothing asks for more.
fn reference(config: &RunConfig) -> RunConfig {
    RunConfig { layout: LayoutConfig::default(), ..config.clone() }
}

/// The same computation, with all that is compared written down and nothing else done.
fn watched(config: &RunConfig, steps: u64) -> RunConfig {
    let mut config = config.clone();
    config.train.steps = config.train.steps.max(steps);
    config.log.hashes_every = 1;
    (config.evaluation.every, config.checkpoint.every) = (0, 0);
    config
}
