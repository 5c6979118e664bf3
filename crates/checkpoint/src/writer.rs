//! Saving a step: shard files by many ranks, one commit by rank 0.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::folder::{Entry, load_manifest, replaced_folder, scan, step_folder, temp_folder};
use crate::manifest::{FileEntry, MANIFEST_FILE, Manifest, PieceEntry, TensorInfo};
use crate::reader::Reader;
use crate::retention::clean_with;
use crate::shard::{Piece, ShardReport, write_shard};
use crate::storage::{Disk, Storage, ensure_dir, remove_folder};

/// Which save this is. All ranks of a save have the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaveId {
    /// Names the run; the same over restarts.
    pub run_id: String,
    /// Counts the starts of the run: one higher after each restart.
    pub epoch: u64,
    /// The step whose result is saved.
    pub step: u64,
}

impl SaveId {
    fn temp(&self, dir: &Path) -> PathBuf {
        dir.join(temp_folder(self.step, self.epoch))
    }
}

/// Writes shard files of one save. Every rank has one; clones may be used by several threads.
#[derive(Clone)]
pub struct ShardWriter {
    storage: Arc<dyn Storage>,
    dir: PathBuf,
    temp: PathBuf,
    id: SaveId,
}

impl ShardWriter {
    /// Joins the save that rank 0 has begun in `dir` with [`Writer::begin`]; call it after rank 0 said so.
    ///
    /// # Errors
    /// [`Error::Refused`] if rank 0 has not begun this save, or has given it up.
    pub fn join(dir: &Path, id: &SaveId) -> Result<Self> {
        let temp = id.temp(dir);
        if !temp.is_dir() {
            let reason =
                format!("the save of step {} has no folder {}; rank 0 begins it", id.step, temp.display());
            return Err(Error::Refused { reason });
        }
        Ok(Self { storage: Arc::new(Disk), dir: dir.to_path_buf(), temp, id: id.clone() })
    }

    /// Writes and syncs one shard file with the given pieces; send the report to rank 0. `name` is the
    /// file's name without suffix, unique in the save, for example `layer003-expert007`. A shard's pieces
    /// are all given at once.
    ///
    /// # Errors
    /// [`Error::Refused`] for a bad name, or a piece whose range, shape and bytes do not agree;
    /// [`Error::Storage`] if the disk refuses: the partial file is removed; [`Error::StaleEpoch`] if a newer
    /// epoch has taken over and removed this save.
    pub fn write_shard(&self, name: &str, pieces: &[Piece<'_>]) -> Result<ShardReport> {
        write_shard(&*self.storage, &self.temp, name, self.id.step, pieces)
            .map_err(|error| fence(&self.dir, self.id.epoch).err().filter(Error::is_stale).unwrap_or(error))
    }
}

/// What [`Writer::commit`] has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// The checkpoint's folder.
    pub path: PathBuf,
    /// Size of its shard files in bytes.
    pub bytes: u64,
    /// The very same checkpoint was there before; nothing was written.
    pub unchanged: bool,
}

/// A save that is under way, owned by rank 0. Dropping it without a commit removes what was written.
pub struct Writer {
    storage: Arc<dyn Storage>,
    dir: PathBuf,
    temp: PathBuf,
    id: SaveId,
}

impl Writer {
    /// Begins a save in `dir`, which is created if need be, and removes what crashed saves have left there.
    /// A run has one save at a time.
    ///
    /// # Errors
    /// [`Error::StaleEpoch`] if a newer epoch has been here, [`Error::Storage`].
    pub fn begin(dir: &Path, id: SaveId) -> Result<Self> {
        Self::begin_on(Arc::new(Disk), dir, id)
    }

    pub(crate) fn begin_on(storage: Arc<dyn Storage>, dir: &Path, id: SaveId) -> Result<Self> {
        ensure_dir(&*storage, dir)?;
        fence(dir, id.epoch)?;
        clean_with(&*storage, dir, id.epoch)?;
        let temp = id.temp(dir);
        storage.create_dir(&temp)?;
        Ok(Self { storage, dir: dir.to_path_buf(), temp, id })
    }

    /// The writer of rank 0's own shards.
    pub fn shards(&self) -> ShardWriter {
        let Self { storage, dir, temp, id } = self;
        ShardWriter { storage: Arc::clone(storage), dir: dir.clone(), temp: temp.clone(), id: id.clone() }
    }

    /// Commits the save: checks that the reports of all ranks cover every tensor exactly once, writes the
    /// manifest and makes the checkpoint visible, durably. `extra` is small state of the caller's (at most
    /// 1 MiB as JSON). A step that was saved before is replaced, at no moment being without a good version.
    ///
    /// # Errors
    /// [`Error::Refused`] if the reports do not fit together, [`Error::StaleEpoch`], [`Error::Storage`].
    /// What was committed before is intact then, and the save is removed.
    pub fn commit(self, reports: Vec<ShardReport>, extra: serde_json::Value) -> Result<Committed> {
        fence(&self.dir, self.id.epoch)?;
        let manifest = assemble(&self.id, reports, extra).map_err(Error::refused)?;
        self.check_folder(&manifest)?;
        let encoded = manifest.encode().map_err(Error::refused)?;
        let bytes = manifest.body.files.iter().map(|file| file.bytes).sum();
        self.write_manifest(&encoded)?;

        fence(&self.dir, self.id.epoch)?;
        let path = self.dir.join(step_folder(self.id.step));
        if !path.exists() {
            self.storage.rename(&self.temp, &path)?;
            self.storage.sync_dir(&self.dir)?;
            return Ok(Committed { path, bytes, unchanged: false });
        }
        let unchanged = fs::read(path.join(MANIFEST_FILE)).is_ok_and(|former| former == encoded)
            && Reader::at(path.clone(), self.id.step).and_then(|reader| reader.verify()).is_ok();
        if !unchanged {
            self.replace(&path)?;
        }
        Ok(Committed { path, bytes, unchanged })
    }

    /// Gives the save up and removes what was written.
    ///
    /// # Errors
    /// [`Error::Storage`] if that fails; the next [`Writer::begin`] tries again.
    pub fn abort(self) -> Result<()> {
        if self.temp.exists() { remove_folder(&*self.storage, &self.temp) } else { Ok(()) }
    }

    fn write_manifest(&self, encoded: &[u8]) -> Result<()> {
        let path = self.temp.join(MANIFEST_FILE);
        let mut file = self.storage.create_file(&path)?;
        self.storage.write(&mut file, &path, encoded)?;
        self.storage.sync_file(&file, &path)?;
        self.storage.sync_dir(&self.temp)
    }

    /// Exchanges the step's folder. A folder cannot be renamed onto another, so the former one steps aside;
    /// readers take it from there until the new one has its name.
    fn replace(&self, path: &Path) -> Result<()> {
        let aside = self.dir.join(replaced_folder(self.id.step));
        self.storage.rename(path, &aside)?;
        if let Err(error) = self.storage.rename(&self.temp, path) {
            // If this fails, too, readers and the next save still find the former version.
            let _ = self.storage.rename(&aside, path);
            return Err(error);
        }
        self.storage.sync_dir(&self.dir)?;
        Reader::at(path.to_path_buf(), self.id.step)?.verify()?;
        remove_folder(&*self.storage, &aside)?;
        self.storage.sync_dir(&self.dir)
    }

    /// The folder holds the reported files and nothing else.
    fn check_folder(&self, manifest: &Manifest) -> Result<()> {
        let mut reported: BTreeMap<_, _> =
            manifest.body.files.iter().map(|file| (file.name.as_str(), file.bytes)).collect();
        for entry in fs::read_dir(&self.temp).map_err(Error::storage("read folder", &self.temp))? {
            let entry = entry.map_err(Error::storage("read folder", &self.temp))?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let bytes = entry.metadata().map_err(Error::storage("look at", &entry.path()))?.len();
            match reported.remove(name.as_ref()) {
                Some(expected) if expected == bytes => {}
                Some(expected) => {
                    return Err(Error::refused(format!(
                        "{name} has {bytes} bytes, {expected} were reported"
                    )));
                }
                None => return Err(Error::refused(format!("{name} was written, but no report names it"))),
            }
        }
        match reported.pop_first() {
            None => Ok(()),
            Some((name, _)) => Err(Error::refused(format!("{name} was reported, but is not in the folder"))),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if self.temp.exists() {
            // Best effort: the error that led here is the one to tell, and the next `begin` cleans up.
            let _ = remove_folder(&*self.storage, &self.temp);
        }
    }
}

/// Refuses a writer when a newer epoch has saved, or is saving, in the same folder. Damaged manifests say
/// nothing about epochs and are passed over.
pub(crate) fn fence(dir: &Path, ours: u64) -> Result<()> {
    for (entry, path) in scan(dir)? {
        let found = match entry {
            Entry::Temp { epoch } => epoch,
            Entry::Step(step) | Entry::Replaced(step) => match load_manifest(&path, step) {
                Ok(manifest) => manifest.body.epoch,
                Err(_) => continue,
            },
            Entry::Removed => continue,
        };
        if found > ours {
            return Err(Error::StaleEpoch { dir: dir.to_path_buf(), ours, found });
        }
    }
    Ok(())
}

/// Joins the reports of all ranks. The result depends on what was reported, not on the order.
fn assemble(
    id: &SaveId,
    mut reports: Vec<ShardReport>,
    extra: serde_json::Value,
) -> std::result::Result<Manifest, String> {
    reports.sort_by(|a, b| a.file.cmp(&b.file));
    let mut numbers: BTreeMap<&str, (u32, &TensorInfo)> = BTreeMap::new();
    for report in &reports {
        for piece in &report.pieces {
            let (_, known) = numbers.entry(&piece.tensor.name).or_insert((0, &piece.tensor));
            if **known != piece.tensor {
                let (name, file) = (&known.name, &report.file);
                let found = (piece.tensor.dtype.name(), &piece.tensor.shape);
                let before = (known.dtype.name(), &known.shape);
                return Err(format!("tensor {name} is {found:?} in {file}, but {before:?} in another shard"));
            }
        }
    }
    for (number, entry) in numbers.values_mut().enumerate() {
        entry.0 = u32::try_from(number).map_err(|_| "too many tensors".to_string())?;
    }
    let tensors = numbers.values().map(|(_, info)| (*info).clone()).collect();
    let files = reports.iter().map(|report| {
        let pieces = report.pieces.iter().map(|piece| PieceEntry {
            tensor: numbers[piece.tensor.name.as_str()].0,
            start: piece.start,
            end: piece.end,
            offset: piece.offset,
            blake3: piece.blake3,
        });
        FileEntry {
            name: report.file.clone(),
            bytes: report.bytes,
            blake3: report.blake3,
            pieces: pieces.collect(),
        }
    });
    Manifest::new(id.run_id.clone(), id.epoch, id.step, tensors, files.collect(), extra)
}
