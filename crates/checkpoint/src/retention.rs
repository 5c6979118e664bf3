//! Removing: old checkpoints, and what crashed saves have left.

use std::num::NonZeroUsize;
use std::path::Path;

use crate::error::{Error, Result};
use crate::folder::{Entry, removed_folder, scan, step_folder, steps};
use crate::reader::Reader;
use crate::storage::{Disk, Storage, remove_folder};
use crate::writer::fence;

/// Removes what crashed saves have left in `dir`, and finishes or undoes a replacement that was cut off.
/// Call it when a run starts; [`crate::Writer::begin`] does it, too. No save may be under way.
///
/// # Errors
/// [`Error::StaleEpoch`] if a newer epoch than `epoch` has been here, [`Error::Storage`].
pub fn clean(dir: &Path, epoch: u64) -> Result<()> {
    fence(dir, epoch)?;
    clean_with(&Disk, dir, epoch)
}

pub(crate) fn clean_with(storage: &dyn Storage, dir: &Path, epoch: u64) -> Result<()> {
    let mut changed = false;
    for (entry, path) in scan(dir)? {
        match entry {
            Entry::Step(_) => continue,
            Entry::Temp { epoch: found } if found > epoch => continue,
            Entry::Temp { .. } | Entry::Removed => remove_folder(storage, &path)?,
            Entry::Replaced(step) => settle(storage, dir, step, &path)?,
        }
        changed = true;
    }
    if changed { storage.sync_dir(dir) } else { Ok(()) }
}

/// Of the two versions of a step that was being replaced, keeps the new one if it is whole.
fn settle(storage: &dyn Storage, dir: &Path, step: u64, aside: &Path) -> Result<()> {
    let path = dir.join(step_folder(step));
    if path.exists() {
        match Reader::at(path.clone(), step).and_then(|reader| reader.verify()) {
            Ok(_) => return remove_folder(storage, aside),
            Err(error) if error.is_corrupt() => remove_step(storage, dir, step, &path)?,
            // Which one is whole cannot be told while the disk does not answer: both stay.
            Err(error) => return Err(error),
        }
    }
    storage.rename(aside, &path)
}

/// Removes a committed step. It loses its name first, so that a crash half-way leaves no damaged step.
fn remove_step(storage: &dyn Storage, dir: &Path, step: u64, path: &Path) -> Result<()> {
    let doomed = dir.join(removed_folder(step));
    if doomed.exists() {
        remove_folder(storage, &doomed)?;
    }
    storage.rename(path, &doomed)?;
    remove_folder(storage, &doomed)
}

/// What [`keep_last`] has done.
#[derive(Debug, Default)]
pub struct Kept {
    /// Good steps that are still there, newest first.
    pub kept: Vec<u64>,
    /// Steps that were removed, newest first.
    pub removed: Vec<u64>,
    /// Bad steps that were found among the newest, and why. They do not count, and are removed once they
    /// are older than those that do.
    pub rejected: Vec<(u64, Error)>,
}

/// Keeps the newest `count` good checkpoints and removes the older ones. The newest good one is verified,
/// every hash included, before anything is removed; of the others, manifest and sizes are checked. If no
/// checkpoint verifies, nothing is removed. Calls `read` after each file that it has read.
///
/// # Errors
/// [`Error::Storage`] if the folder cannot be read or a checkpoint cannot be removed.
pub fn keep_last(dir: &Path, count: NonZeroUsize, read: &dyn Fn()) -> Result<Kept> {
    keep_last_with(&Disk, dir, count, read)
}

pub(crate) fn keep_last_with(
    storage: &dyn Storage,
    dir: &Path,
    count: NonZeroUsize,
    read: &dyn Fn(),
) -> Result<Kept> {
    let mut result = Kept::default();
    for (step, path) in steps(dir)?.into_iter().rev() {
        if result.kept.len() == count.get() {
            remove_step(storage, dir, step, &path)?;
            result.removed.push(step);
            continue;
        }
        let verified = Reader::at(path, step).and_then(|reader| {
            if result.kept.is_empty() { reader.verify_telling(read).map(drop) } else { reader.check_sizes() }
        });
        match verified {
            Ok(()) => result.kept.push(step),
            Err(error) => result.rejected.push((step, error)),
        }
    }
    if !result.removed.is_empty() {
        storage.sync_dir(dir)?;
    }
    Ok(result)
}
