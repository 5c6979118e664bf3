//! The folder of all checkpoints of a run: which steps there are, and which of them verify.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::manifest::{MANIFEST_FILE, MAX_MANIFEST_BYTES, Manifest};
use crate::reader::Reader;

/// What a name in the checkpoints' folder means. Other names are left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// A committed step.
    Step(u64),
    /// A save that is under way, or was when its process died.
    Temp { epoch: u64 },
    /// A step that is being removed.
    Removed,
    /// The former version of a step that is saved again; it counts while there is no `Step`.
    Replaced(u64),
}

pub(crate) fn step_folder(step: u64) -> String {
    format!("step-{step:06}")
}

pub(crate) fn temp_folder(step: u64, epoch: u64) -> String {
    format!(".tmp-step-{step:06}-{epoch}")
}

pub(crate) fn removed_folder(step: u64) -> String {
    format!(".tmp-removed-step-{step:06}")
}

pub(crate) fn replaced_folder(step: u64) -> String {
    format!(".replaced-step-{step:06}")
}

impl Entry {
    fn parse(name: &str) -> Option<Self> {
        // Only the names that are written by the functions above: one step, one folder.
        if let Some(digits) = name.strip_prefix("step-") {
            let step = digits.parse().ok()?;
            return (name == step_folder(step)).then_some(Self::Step(step));
        }
        if let Some(digits) = name.strip_prefix(".replaced-step-") {
            let step = digits.parse().ok()?;
            return (name == replaced_folder(step)).then_some(Self::Replaced(step));
        }
        if let Some(digits) = name.strip_prefix(".tmp-removed-step-") {
            let step = digits.parse().ok()?;
            return (name == removed_folder(step)).then_some(Self::Removed);
        }
        let (step, epoch) = name.strip_prefix(".tmp-step-")?.split_once('-')?;
        let (step, epoch) = (step.parse().ok()?, epoch.parse().ok()?);
        (name == temp_folder(step, epoch)).then_some(Self::Temp { epoch })
    }
}

/// Every entry of ours in `dir`, which may not exist yet.
pub(crate) fn scan(dir: &Path) -> Result<Vec<(Entry, PathBuf)>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        // Nor are there any below a file.
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        Err(error) => return Err(Error::storage("read folder", dir)(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(Error::storage("read folder", dir))?;
        if let Some(kind) = entry.file_name().to_str().and_then(Entry::parse) {
            found.push((kind, entry.path()));
        }
    }
    found.sort_by(|a, b| a.1.cmp(&b.1));
    Ok(found)
}

/// The committed steps and where each is.
pub(crate) fn steps(dir: &Path) -> Result<BTreeMap<u64, PathBuf>> {
    let mut steps = BTreeMap::new();
    for (entry, path) in scan(dir)? {
        match entry {
            Entry::Step(step) => {
                steps.insert(step, path);
            }
            // A crash between the two renames of a replacement leaves only this one.
            Entry::Replaced(step) => {
                steps.entry(step).or_insert(path);
            }
            Entry::Temp { .. } | Entry::Removed => {}
        }
    }
    Ok(steps)
}

pub(crate) fn locate(dir: &Path, step: u64) -> Result<PathBuf> {
    steps(dir)?.remove(&step).ok_or_else(|| Error::NoSuchStep { dir: dir.to_path_buf(), step })
}

/// Reads and checks the manifest of the step folder `path`.
pub(crate) fn load_manifest(path: &Path, step: u64) -> Result<Manifest> {
    let path = path.join(MANIFEST_FILE);
    let unusable = |reason: String| Error::Manifest { path: path.clone(), reason };
    let bytes = match fs::symlink_metadata(&path) {
        Ok(metadata) if !metadata.is_file() => return Err(unusable("it is not a regular file".into())),
        Ok(metadata) if metadata.len() > MAX_MANIFEST_BYTES => {
            return Err(unusable(format!(
                "it has {} bytes, at most {MAX_MANIFEST_BYTES} are read",
                metadata.len()
            )));
        }
        Ok(metadata) => {
            let mut bytes = Vec::with_capacity(metadata.len() as usize);
            let file = File::open(&path).map_err(Error::storage("open", &path))?;
            file.take(MAX_MANIFEST_BYTES).read_to_end(&mut bytes).map_err(Error::storage("read", &path))?;
            bytes
        }
        Err(error) if error.kind() == ErrorKind::NotFound => return Err(unusable("it is missing".into())),
        Err(error) => return Err(Error::storage("look at", &path)(error)),
    };
    let manifest = Manifest::decode(&bytes).map_err(unusable)?;
    if manifest.body.step != step {
        return Err(unusable(format!("it belongs to step {}, not {step}", manifest.body.step)));
    }
    Ok(manifest)
}

/// What a usable manifest says, for a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// The run that wrote it.
    pub run_id: String,
    /// The epoch of the run that wrote it.
    pub epoch: u64,
    /// Number of tensors.
    pub tensors: usize,
    /// Number of shard files.
    pub files: usize,
    /// Size of all shard files in bytes.
    pub bytes: u64,
}

/// One checkpoint of a listing.
#[derive(Debug)]
pub struct Listed {
    /// The step.
    pub step: u64,
    /// Its folder.
    pub path: PathBuf,
    /// What its manifest says, or why it cannot be used. Sizes are checked, hashes of files are not.
    pub state: Result<Summary>,
}

/// Lists the committed checkpoints in `dir`, oldest step first. A folder that does not exist has none.
///
/// # Errors
/// [`Error::Storage`] if the folder cannot be read; a bad checkpoint is listed as such.
pub fn list(dir: &Path) -> Result<Vec<Listed>> {
    let listed = steps(dir)?.into_iter().map(|(step, path)| {
        let state = Reader::at(path.clone(), step).and_then(|reader| {
            reader.check_sizes()?;
            Ok(reader.summary())
        });
        Listed { step, path, state }
    });
    Ok(listed.collect())
}

/// The result of [`latest`].
#[derive(Debug)]
pub struct Latest {
    /// The newest step that verifies, if there is one.
    pub step: Option<u64>,
    /// Newer steps that do not, newest first, and why: tell the user.
    pub rejected: Vec<(u64, Error)>,
}

/// Finds the newest checkpoint in `dir` that verifies, every hash included, passing over bad ones. Calls `read` after each
/// file that it has read: large checkpoints take long.
///
/// # Errors
/// [`Error::Storage`] if the folder itself cannot be read.
pub fn latest(dir: &Path, read: &dyn Fn()) -> Result<Latest> {
    let mut rejected = Vec::new();
    for (step, path) in steps(dir)?.into_iter().rev() {
        match Reader::at(path, step).and_then(|reader| reader.verify_telling(read)) {
            Ok(_) => return Ok(Latest { step: Some(step), rejected }),
            Err(error) => rejected.push((step, error)),
        }
    }
    Ok(Latest { step: None, rejected })
}

/// What [`verify`] has read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Number of shard files.
    pub files: usize,
    /// Bytes hashed.
    pub bytes: u64,
}

/// Reads every file of the checkpoint of `step` and compares it with the manifest's hashes. Streams: memory
/// does not depend on the size of the files.
///
/// # Errors
/// [`Error::NoSuchStep`], [`Error::Manifest`], [`Error::Corrupt`] for the first file that differs,
/// [`Error::Storage`].
pub fn verify(dir: &Path, step: u64) -> Result<Verified> {
    Reader::open(dir, step)?.verify()
}
