//! Files that are either whole or absent, and bounded reads.

use crate::error::{DataError, Result};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// The suffix of a file that is still being written.
pub(crate) const PARTIAL_SUFFIX: &str = ".partial";

/// `path` with [`PARTIAL_SUFFIX`] appended.
pub(crate) fn partial_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(PARTIAL_SUFFIX);
    PathBuf::from(name)
}

/// Gives the fully written `file` at `partial` its final name `path`: fsync, rename, fsync of the folder.
pub(crate) fn commit(file: File, partial: &Path, path: &Path) -> Result<()> {
    file.sync_all().map_err(DataError::io("write to disk", partial))?;
    drop(file);
    fs::rename(partial, path).map_err(DataError::io("rename to its final name", partial))?;
    sync_folder(path.parent().unwrap_or(Path::new(".")))
}

/// Writes `bytes` to `path` by way of a partial file.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let partial = partial_path(path);
    let mut file = File::create(&partial).map_err(DataError::io("create", &partial))?;
    file.write_all(bytes).map_err(DataError::io("write", &partial))?;
    commit(file, &partial, path)
}

/// Makes renames in `folder` survive a crash. Only Unix opens folders; elsewhere the file system decides.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    if cfg!(unix) {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let handle = File::open(folder).map_err(DataError::io("open", folder))?;
        handle.sync_all().map_err(DataError::io("write to disk", folder))?;
    }
    Ok(())
}

/// The contents of `path`, or `None` when it holds more than `limit` bytes (then at most `limit` + 1 are read).
pub(crate) fn read_at_most(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    let file = File::open(path).map_err(DataError::io("open", path))?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(DataError::io("read", path))?;
    Ok((bytes.len() as u64 <= limit).then_some(bytes))
}
