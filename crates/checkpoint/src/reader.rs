//! Verified reading by logical coordinate.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::SystemTime;

use blake3::{Hash, Hasher};

use crate::error::{Error, Result};
use crate::folder::{Summary, Verified, load_manifest, locate};
use crate::manifest::{FileEntry, Manifest, PieceEntry, TensorInfo};

/// Bytes read and hashed at a time.
pub(crate) const CHUNK: usize = 1 << 20;

/// Identity of a file's contents as the operating system tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    bytes: u64,
    modified: Option<SystemTime>,
}

/// A committed checkpoint, open for reading. Each file is compared with its hash the first time it is
/// touched, before any of its bytes is handed out. May be shared by threads; keeps no file open.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    manifest: Manifest,
    /// For each file: what it looked like when its hash was found right.
    verified: Vec<Mutex<Option<Stamp>>>,
}

impl Reader {
    /// Opens the checkpoint of `step` in `dir` and checks its manifest.
    ///
    /// # Errors
    /// [`Error::NoSuchStep`], [`Error::Manifest`] if the manifest is damaged, [`Error::Storage`].
    pub fn open(dir: &Path, step: u64) -> Result<Self> {
        Self::at(locate(dir, step)?, step)
    }

    /// Opens the step folder `path`.
    pub(crate) fn at(path: PathBuf, step: u64) -> Result<Self> {
        let manifest = load_manifest(&path, step)?;
        let verified = manifest.body.files.iter().map(|_| Mutex::new(None)).collect();
        Ok(Self { path, manifest, verified })
    }

    /// The step it was saved at.
    pub fn step(&self) -> u64 {
        self.manifest.body.step
    }

    /// The epoch of the run that saved it.
    pub fn epoch(&self) -> u64 {
        self.manifest.body.epoch
    }

    /// The run that saved it.
    pub fn run_id(&self) -> &str {
        &self.manifest.body.run_id
    }

    /// The caller's own state, as given to [`crate::Writer::commit`].
    pub fn extra(&self) -> &serde_json::Value {
        &self.manifest.extra
    }

    /// All tensors, ascending by name.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.manifest.body.tensors
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.manifest.find(name).map(|number| &self.manifest.body.tensors[number])
    }

    /// Reads elements `range` of a tensor, gathered from whichever pieces cover it, as little-endian bytes.
    ///
    /// # Errors
    /// [`Error::Request`] for an unknown tensor or a range outside of it, [`Error::Corrupt`] if a file that
    /// holds part of it is damaged, [`Error::Storage`].
    pub fn read(&self, tensor: &str, range: Range<u64>) -> Result<Vec<u8>> {
        let (number, size) = self.request(tensor, &range)?;
        // Before memory is taken by its numbers, the manifest is compared with the files there are.
        for (file, _) in self.pieces(number, &range) {
            self.verify_file(file)?;
        }
        let mut bytes = vec![0; size];
        self.gather(number, range, &mut bytes)?;
        Ok(bytes)
    }

    /// Like [`Reader::read`], into memory of the caller's: `out` has exactly the range's size in bytes.
    ///
    /// # Errors
    /// As [`Reader::read`]; [`Error::Request`] if `out` has another size. After an error `out` is not
    /// specified.
    pub fn read_into(&self, tensor: &str, range: Range<u64>, out: &mut [u8]) -> Result<()> {
        let (number, size) = self.request(tensor, &range)?;
        if out.len() != size {
            let found = out.len();
            let reason =
                format!("elements {}..{} have {size} bytes, the buffer {found}", range.start, range.end);
            return Err(self.bad_request(tensor, reason));
        }
        self.gather(number, range, out)
    }

    /// Compares every file with its hash.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for the first file that differs, [`Error::Storage`].
    pub fn verify(&self) -> Result<Verified> {
        self.verify_telling(&|| ())
    }

    /// As [`Reader::verify`]; calls `read` after each file.
    pub(crate) fn verify_telling(&self, read: &dyn Fn()) -> Result<Verified> {
        self.check_sizes()?;
        for file in 0..self.verified.len() {
            self.verify_file(file)?;
            read();
        }
        let Summary { files, bytes, .. } = self.summary();
        Ok(Verified { files, bytes })
    }

    pub(crate) fn summary(&self) -> Summary {
        let body = &self.manifest.body;
        Summary {
            run_id: body.run_id.clone(),
            epoch: body.epoch,
            tensors: body.tensors.len(),
            files: body.files.len(),
            // Saturates only for a crafted manifest, whose files then fail their own check.
            bytes: body.files.iter().fold(0, |sum, file| sum.saturating_add(file.bytes)),
        }
    }

    /// Compares the sizes of all files with the manifest.
    pub(crate) fn check_sizes(&self) -> Result<()> {
        (0..self.verified.len()).try_for_each(|file| self.stamp(file).map(drop))
    }

    fn find(&self, tensor: &str) -> Result<usize> {
        self.manifest.find(tensor).ok_or_else(|| {
            let count = self.tensors().len();
            self.bad_request(tensor, format!("it is none of the {count} tensors of this checkpoint"))
        })
    }

    /// The tensor of that name, or an error that names it.
    pub(crate) fn require(&self, tensor: &str) -> Result<&TensorInfo> {
        self.find(tensor).map(|number| &self.manifest.body.tensors[number])
    }

    /// The tensor's number and the size of the range in bytes.
    fn request(&self, tensor: &str, range: &Range<u64>) -> Result<(usize, usize)> {
        let Some(number) = self.manifest.find(tensor) else {
            let count = self.tensors().len();
            return Err(
                self.bad_request(tensor, format!("it is none of the {count} tensors of this checkpoint"))
            );
        };
        let info = &self.manifest.body.tensors[number];
        let (Range { start, end }, len) = (range, info.len());
        if start > end || *end > len {
            return Err(self.bad_request(tensor, format!("elements {start}..{end} are outside of 0..{len}")));
        }
        let size = usize::try_from((end - start) * info.dtype.size()).map_err(|_| {
            self.bad_request(tensor, format!("elements {start}..{end} do not fit into memory"))
        })?;
        Ok((number, size))
    }

    fn bad_request(&self, tensor: &str, reason: String) -> Error {
        Error::Request { path: self.path.clone(), tensor: tensor.to_string(), reason }
    }

    /// The pieces of a tensor that meet `range`, ascending, each with its file's number.
    fn pieces(&self, tensor: usize, range: &Range<u64>) -> impl Iterator<Item = (usize, &PieceEntry)> {
        let Range { start, end } = *range;
        let index = &self.manifest.index;
        // From the last piece that begins at or before `start`.
        let after = index.partition_point(|entry| (entry.tensor as usize, entry.start) <= (tensor, start));
        index[after.saturating_sub(1)..]
            .iter()
            .skip_while(move |entry| (entry.tensor as usize) < tensor)
            .take_while(move |entry| entry.tensor as usize == tensor && entry.start < end)
            .map(|entry| self.manifest.piece(*entry))
            .filter(move |(_, piece)| piece.end > start)
    }

    fn gather(&self, tensor: usize, range: Range<u64>, out: &mut [u8]) -> Result<()> {
        let size = self.manifest.body.tensors[tensor].dtype.size();
        for (file, piece) in self.pieces(tensor, &range) {
            let (start, end) = (piece.start.max(range.start), piece.end.min(range.end));
            // Within `out`: its size is the range's size in bytes.
            let (from, to) = ((start - range.start) * size, (end - range.start) * size);
            let part = &mut out[from as usize..to as usize];
            self.verify_file(file)?;
            self.read_at(file, piece, piece.offset + (start - piece.start) * size, part)?;
        }
        Ok(())
    }

    /// Reads from a file that has been verified.
    fn read_at(&self, file: usize, piece: &PieceEntry, offset: u64, out: &mut [u8]) -> Result<()> {
        let path = self.path.join(&self.manifest.body.files[file].name);
        let mut open = File::open(&path).map_err(Error::storage("open", &path))?;
        open.seek(SeekFrom::Start(offset)).map_err(Error::storage("seek in", &path))?;
        open.read_exact(out).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => {
                self.corrupt(file, self.part(piece), offset, "the file has become shorter")
            }
            _ => Error::storage("read", &path)(error),
        })
    }

    /// Compares a file with its hash unless that was done before and the file has not changed since.
    fn verify_file(&self, file: usize) -> Result<()> {
        let entry = &self.manifest.body.files[file];
        // The value behind the lock is replaced as a whole, so a panic of another thread cannot spoil it.
        let mut verified = self.verified[file].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let stamp = self.stamp(file)?;
        if *verified == Some(stamp) {
            return Ok(());
        }
        *verified = None;
        let path = self.path.join(&entry.name);
        let found = hash_range(&path, 0, entry.bytes)?;
        if found != entry.blake3 {
            return Err(self.locate_damage(file, &path, found));
        }
        *verified = Some(stamp);
        Ok(())
    }

    /// Size and time of a file; the size must be the manifest's.
    fn stamp(&self, file: usize) -> Result<Stamp> {
        let entry = &self.manifest.body.files[file];
        let path = self.path.join(&entry.name);
        let corrupt = |offset, reason: &str| self.corrupt(file, self.part_at(entry, offset), offset, reason);
        let metadata = match fs::symlink_metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(corrupt(0, "the file is missing"));
            }
            Err(error) => return Err(Error::storage("look at", &path)(error)),
        };
        if !metadata.is_file() {
            return Err(corrupt(0, "it is not a regular file"));
        }
        if metadata.len() != entry.bytes {
            let reason = format!("the file has {} bytes, not {}", metadata.len(), entry.bytes);
            return Err(corrupt(metadata.len().min(entry.bytes), &reason));
        }
        Ok(Stamp { bytes: metadata.len(), modified: metadata.modified().ok() })
    }

    /// Finds the first piece whose own hash differs, so that the message can name it.
    fn locate_damage(&self, file: usize, path: &Path, found: Hash) -> Error {
        let entry = &self.manifest.body.files[file];
        for piece in &entry.pieces {
            let size =
                (piece.end - piece.start) * self.manifest.body.tensors[piece.tensor as usize].dtype.size();
            match hash_range(path, piece.offset, size) {
                Ok(hash) if hash == piece.blake3 => {}
                Ok(hash) => {
                    let reason = format!("BLAKE3 is {hash}, not {}", piece.blake3);
                    return self.corrupt(file, self.part(piece), piece.offset, &reason);
                }
                Err(error) => return error,
            }
        }
        let reason =
            format!("BLAKE3 of the file is {found}, not {}, while all its pieces match", entry.blake3);
        self.corrupt(file, "the file header".to_string(), 0, &reason)
    }

    fn corrupt(&self, file: usize, part: String, offset: u64, reason: &str) -> Error {
        let file = self.path.join(&self.manifest.body.files[file].name);
        Error::Corrupt { file, part, offset, reason: reason.to_string() }
    }

    fn part(&self, piece: &PieceEntry) -> String {
        let name = &self.manifest.body.tensors[piece.tensor as usize].name;
        format!("tensor {name}, elements {}..{}", piece.start, piece.end)
    }

    /// The piece that the byte at `offset` belongs to, or the last one before it.
    fn part_at(&self, entry: &FileEntry, offset: u64) -> String {
        let after = entry.pieces.partition_point(|piece| piece.offset <= offset);
        match entry.pieces.get(after.saturating_sub(1)) {
            Some(piece) if after > 0 || offset == 0 => self.part(piece),
            _ => "the file header".to_string(),
        }
    }
}

/// BLAKE3 of `size` bytes from `offset`, streamed.
fn hash_range(path: &Path, offset: u64, size: u64) -> Result<Hash> {
    let mut file = File::open(path).map_err(Error::storage("open", path))?;
    file.seek(SeekFrom::Start(offset)).map_err(Error::storage("seek in", path))?;
    let mut buffer = vec![0; CHUNK.min(usize::try_from(size).unwrap_or(CHUNK))];
    let mut hasher = Hasher::new();
    let mut left = size;
    while left > 0 {
        let count = left.min(buffer.len() as u64) as usize;
        let read = match file.read(&mut buffer[..count]) {
            // Shorter than its metadata said: the hash will differ, which is the answer.
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(Error::storage("read", path)(error)),
        };
        hasher.update(&buffer[..read]);
        left -= read as u64;
    }
    Ok(hasher.finalize())
}
