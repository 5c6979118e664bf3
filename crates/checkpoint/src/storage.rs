//! Every effect on the file system goes through one small trait, so that tests can stop a save after any
//! of its operations and look at what is left.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;

use crate::error::{Error, Result};

/// The file-system effects of a save. Reading is not part of it.
pub(crate) trait Storage: Send + Sync {
    /// Creates one folder; its parent exists, itself it does not.
    fn create_dir(&self, path: &Path) -> Result<()>;
    /// Creates a file that does not exist yet.
    fn create_file(&self, path: &Path) -> Result<File>;
    /// Writes all of `bytes` at the end of `file`, which is at `path`.
    fn write(&self, file: &mut File, path: &Path, bytes: &[u8]) -> Result<()>;
    /// Makes the file's contents durable.
    fn sync_file(&self, file: &File, path: &Path) -> Result<()>;
    /// Makes the entries of a folder durable.
    fn sync_dir(&self, path: &Path) -> Result<()>;
    /// Renames; `to` does not exist.
    fn rename(&self, from: &Path, to: &Path) -> Result<()>;
    /// Removes a file or a symbolic link.
    fn remove_file(&self, path: &Path) -> Result<()>;
    /// Removes an empty folder.
    fn remove_dir(&self, path: &Path) -> Result<()>;
}

/// The real file system.
pub(crate) struct Disk;

impl Storage for Disk {
    fn create_dir(&self, path: &Path) -> Result<()> {
        fs::create_dir(path).map_err(Error::storage("create folder", path))
    }

    fn create_file(&self, path: &Path) -> Result<File> {
        OpenOptions::new().write(true).create_new(true).open(path).map_err(Error::storage("create", path))
    }

    fn write(&self, file: &mut File, path: &Path, bytes: &[u8]) -> Result<()> {
        file.write_all(bytes).map_err(Error::storage("write", path))
    }

    fn sync_file(&self, file: &File, path: &Path) -> Result<()> {
        file.sync_all().map_err(Error::storage("sync", path))
    }

    fn sync_dir(&self, path: &Path) -> Result<()> {
        // Only Unix lets a folder be opened and synced; elsewhere renames are ordered by the file system.
        if cfg!(unix) {
            File::open(path).and_then(|dir| dir.sync_all()).map_err(Error::storage("sync folder", path))?;
        }
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        fs::rename(from, to).map_err(Error::storage("rename", from))
    }

    fn remove_file(&self, path: &Path) -> Result<()> {
        fs::remove_file(path).map_err(Error::storage("remove", path))
    }

    fn remove_dir(&self, path: &Path) -> Result<()> {
        fs::remove_dir(path).map_err(Error::storage("remove folder", path))
    }
}

/// Creates `path` and the parents it lacks, each durably.
pub(crate) fn ensure_dir(storage: &dyn Storage, path: &Path) -> Result<()> {
    if path.as_os_str().is_empty() || path.is_dir() {
        return Ok(());
    }
    let parent = path.parent().unwrap_or(Path::new(""));
    ensure_dir(storage, parent)?;
    storage.create_dir(path)?;
    storage.sync_dir(if parent.as_os_str().is_empty() { Path::new(".") } else { parent })
}

/// Removes a folder and what is in it. A symbolic link is removed itself, never what it points to.
pub(crate) fn remove_folder(storage: &dyn Storage, path: &Path) -> Result<()> {
    let metadata = fs::symlink_metadata(path).map_err(Error::storage("look at", path))?;
    if !metadata.is_dir() {
        return storage.remove_file(path);
    }
    for entry in fs::read_dir(path).map_err(Error::storage("read folder", path))? {
        let entry = entry.map_err(Error::storage("read folder", path))?;
        remove_folder(storage, &entry.path())?;
    }
    storage.remove_dir(path)
}
