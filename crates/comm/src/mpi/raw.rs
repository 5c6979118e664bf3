//! The calls to the MPI library: all of this crate's `unsafe` code.
//!
//! MPI is initialised for serialised threads: one thread at a time calls it. Everything here is reached through the
//! engine's lock only. Memory that a request works on is owned by the table of requests until the request is complete,
//! so neither a peer nor the library can touch memory that is gone.

use std::ffi::c_int;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use mpi::environment::{Threading, Universe, initialize_with_threading};
use mpi::ffi;

use super::cores::{Cores, own_cores};
use super::neighbour::{ProcessId, this_process};
use crate::copying::copy;
use crate::error::CommError;
use crate::part::Piece;
use crate::transport::ByteBuffer;

/// Tags that every MPI library has (MPI 3.1, section 8.1.2).
pub(super) const TAGS: u32 = 32_768;

/// The two streams between two ranks, which never mix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Channel {
    /// Small messages of the engine.
    Control,
    /// Payload.
    Data,
}

/// The initialised library.
pub(super) struct Library {
    /// None once it is finalised, or when it must not be.
    universe: Option<Universe>,
    control: ffi::MPI_Comm,
    data: ffi::MPI_Comm,
    pub rank: usize,
    pub size: usize,
    /// The node of each rank, numbered by their lowest ranks.
    pub nodes: Vec<usize>,
    /// The process of each rank.
    pub processes: Vec<ProcessId>,
    /// The cores that each rank may run on.
    pub cores: Vec<Cores>,
    pub version: String,
}

// SAFETY: communicators are handles of the process, not of a thread, and the library was initialised for calls from
// several threads, one at a time.
unsafe impl Send for Library {}

fn check(code: c_int, what: &str) -> Result<(), CommError> {
    if code == 0 {
        return Ok(());
    }
    let mut text = [0u8; 1024];
    let mut len: c_int = 0;
    // SAFETY: the buffer has more than MPI_MAX_ERROR_STRING bytes in all libraries (at most 512), and `len` is written.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut len) };
    let text = String::from_utf8_lossy(&text[..usize::try_from(len).unwrap_or(0).min(1024)]).into_owned();
    Err(CommError::Transport(format!("MPI failed to {what}: {text}")))
}

fn index(value: c_int) -> usize {
    usize::try_from(value).unwrap_or(0)
}

impl Library {
    /// Initialises MPI.
    pub fn start() -> Result<Self, CommError> {
        let refuse = |text: &str| CommError::Transport(text.into());
        let (universe, level) = initialize_with_threading(Threading::Serialized)
            .ok_or_else(|| refuse("MPI was initialised before"))?;
        if level < Threading::Serialized {
            return Err(refuse(
                "this MPI library cannot be called from several threads: build it with threads",
            ));
        }
        let mut library = Self {
            universe: Some(universe),
            control: Self::private_world()?,
            data: Self::private_world()?,
            rank: 0,
            size: 0,
            nodes: Vec::new(),
            processes: Vec::new(),
            cores: Vec::new(),
            version: version(),
        };
        let (mut rank, mut size) = (0, 0);
        // SAFETY: the communicator is valid and both numbers are written.
        unsafe {
            check(ffi::MPI_Comm_rank(library.control, &mut rank), "tell the rank")?;
            check(ffi::MPI_Comm_size(library.control, &mut size), "tell the size")?;
        }
        (library.rank, library.size) = (index(rank), index(size));
        library.nodes = library.discover_nodes(rank)?;
        library.processes = library.gather(this_process())?;
        library.cores = library.gather(own_cores())?;
        Ok(library)
    }

    /// A copy of the world whose errors come back as codes.
    fn private_world() -> Result<ffi::MPI_Comm, CommError> {
        // SAFETY: MPI is initialised, and the new communicator is written before it is used.
        unsafe {
            let mut comm = ffi::RSMPI_COMM_NULL;
            check(ffi::MPI_Comm_dup(ffi::RSMPI_COMM_WORLD, &mut comm), "copy the world")?;
            check(ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN), "return its errors")?;
            Ok(comm)
        }
    }

    /// Ranks that can share memory are on one node.
    fn discover_nodes(&self, rank: c_int) -> Result<Vec<usize>, CommError> {
        let mut lowest = vec![0 as c_int; self.size];
        // SAFETY: all buffers are as long as counts and ranks say: one number a rank.
        unsafe {
            let mut node = ffi::RSMPI_COMM_NULL;
            let (kind, info) = (ffi::RSMPI_COMM_TYPE_SHARED, ffi::RSMPI_INFO_NULL);
            check(ffi::MPI_Comm_split_type(self.control, kind, rank, info, &mut node), "split by node")?;
            let mut first = rank;
            let int = ffi::RSMPI_INT32_T;
            check(ffi::MPI_Bcast((&raw mut first).cast(), 1, int, 0, node), "name a node")?;
            let all = lowest.as_mut_ptr().cast();
            let gathered = ffi::MPI_Allgather((&raw const first).cast(), 1, int, all, 1, int, self.control);
            check(gathered, "gather the nodes")?;
            check(ffi::MPI_Comm_free(&mut node), "let a communicator go")?;
        }
        let mut names: Vec<c_int> = lowest.clone();
        names.sort_unstable();
        names.dedup();
        Ok(lowest.iter().map(|name| names.binary_search(name).unwrap_or(0)).collect())
    }

    /// The numbers of every rank.
    fn gather<const N: usize>(&self, own: [u64; N]) -> Result<Vec<[u64; N]>, CommError> {
        let mut all = vec![[0; N]; self.size];
        // SAFETY: N numbers are sent, and there is room for those of each rank.
        unsafe {
            let (count, word, to) = (N as c_int, ffi::RSMPI_UINT64_T, all.as_mut_ptr().cast());
            let gathered =
                ffi::MPI_Allgather(own.as_ptr().cast(), count, word, to, count, word, self.control);
            check(gathered, "gather what ranks say of themselves")?;
        }
        Ok(all)
    }

    /// The communicator of a channel.
    pub fn communicator(&self, channel: Channel) -> ffi::MPI_Comm {
        match channel {
            Channel::Control => self.control,
            Channel::Data => self.data,
        }
    }

    /// Ends the whole job at once with an exit code. Returns only if the library cannot do it.
    pub fn abort(&self, code: i32) {
        // SAFETY: MPI is initialised and not finalised while a `Library` lives.
        unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, code) };
    }

    /// Finalises the library; all ranks do so, and nothing is under way.
    pub fn finalise(&mut self) {
        // SAFETY: both were made by `private_world` and nobody uses them any more.
        unsafe {
            ffi::MPI_Comm_free(&mut self.control);
            ffi::MPI_Comm_free(&mut self.data);
        }
        drop(self.universe.take());
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // Finalising waits for all ranks; a job that has failed must not.
        std::mem::forget(self.universe.take());
    }
}

fn version() -> String {
    let mut text = vec![0u8; 16_384];
    let mut len: c_int = 0;
    // SAFETY: the buffer has more than MPI_MAX_LIBRARY_VERSION_STRING bytes in all libraries (at most 8,192).
    unsafe { ffi::MPI_Get_library_version(text.as_mut_ptr().cast(), &mut len) };
    let text = String::from_utf8_lossy(&text[..index(len).min(text.len())]).into_owned();
    let line = text.lines().next().unwrap_or_default();
    line.split(',').next().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Memory that several requests fill at disjoint places.
pub(super) struct Target {
    base: NonNull<u8>,
    len: usize,
    owner: TargetOwner,
}

/// Whose memory it is.
pub(super) enum TargetOwner {
    /// The caller's.
    Buffer(Box<dyn ByteBuffer + Send>),
    /// The engine's, aligned for every element type.
    Staging(Vec<u64>),
}

// SAFETY: `base` points into what `owner` owns, which may be sent; shared access only copies to places that nobody else
// uses at the time, as `fill` demands.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

impl Target {
    /// The first `len` bytes of `owner`, or all if it has no more.
    pub fn new(mut owner: TargetOwner, len: usize) -> Self {
        let bytes: &mut [u8] = match &mut owner {
            TargetOwner::Buffer(buffer) => buffer.bytes_mut(),
            TargetOwner::Staging(words) => bytemuck::cast_slice_mut(words),
        };
        let len = len.min(bytes.len());
        Self { base: NonNull::from(bytes).cast(), len, owner }
    }

    fn at(&self, range: &Range<usize>) -> *mut u8 {
        assert!(range.start <= range.end && range.end <= self.len, "a place outside of the target");
        // SAFETY: the place lies inside the memory that `owner` keeps.
        unsafe { self.base.as_ptr().add(range.start) }
    }

    /// Copies `bytes` to `at`. No request that is under way may have this place; the engine gives every place to one
    /// frame of one peer.
    pub fn fill(&self, at: usize, bytes: &[u8]) {
        let place = self.at(&(at..at + bytes.len()));
        // SAFETY: the place is inside the memory, nobody else uses it, and the engine's lock orders all accesses.
        copy(bytes, unsafe { std::slice::from_raw_parts_mut(place, bytes.len()) });
    }

    /// All its bytes, once no request is under way, which the exclusive borrow proves: requests hold clones.
    pub fn bytes(&mut self) -> &[u8] {
        // SAFETY: the memory is initialised, owned, and nobody writes to it.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }

    /// The memory itself.
    pub fn into_owner(self) -> TargetOwner {
        self.owner
    }
}

/// What a request works on.
pub(super) enum Memory {
    /// A part of a buffer that is sent.
    Piece(Piece),
    /// A message of the engine's own, sent or received.
    Bytes(Vec<u8>),
    /// A place that is filled.
    Target(Arc<Target>),
}

/// A completed request.
pub(super) struct Completed<T> {
    pub memory: Memory,
    pub of: T,
    /// Bytes received, for a receive.
    pub bytes: usize,
    /// Who sent it, for a receive.
    pub source: usize,
}

/// The requests under way with their memory and what they are for.
pub(super) struct Requests<T> {
    handles: Vec<ffi::MPI_Request>,
    entries: Vec<(Memory, T)>,
    indices: Vec<c_int>,
    statuses: Vec<ffi::MPI_Status>,
}

// SAFETY: request handles are handles of the process, not of a thread; see `Library`.
unsafe impl<T: Send> Send for Requests<T> {}

impl<T> Requests<T> {
    pub fn new() -> Self {
        Self { handles: Vec::new(), entries: Vec::new(), indices: Vec::new(), statuses: Vec::new() }
    }

    /// How many are under way.
    pub fn len(&self) -> usize {
        self.handles.len()
    }

    /// Starts to send `range` of the memory.
    pub fn send(
        &mut self,
        library: &Library,
        (channel, to, tag): (Channel, usize, u32),
        memory: Memory,
        range: Range<usize>,
        of: T,
    ) -> Result<(), CommError> {
        let place: *const u8 = match &memory {
            Memory::Piece(piece) => piece.bytes()[range.clone()].as_ptr(),
            Memory::Bytes(bytes) => bytes[range.clone()].as_ptr(),
            Memory::Target(target) => target.at(&range),
        };
        let (count, peer) = (count(&range)?, to as c_int);
        let comm = library.communicator(channel);
        // SAFETY: a null request is a valid initial value, and `place` has `count` bytes that stay where they are until
        // the request is complete: the entry below owns them (a `Vec` or `Piece` keeps its heap memory when moved).
        let handle = unsafe {
            let mut handle = ffi::RSMPI_REQUEST_NULL;
            let byte = ffi::RSMPI_UINT8_T;
            let code = ffi::MPI_Isend(place.cast(), count, byte, peer, tag as c_int, comm, &mut handle);
            check(code, "send")?;
            handle
        };
        self.handles.push(handle);
        self.entries.push((memory, of));
        Ok(())
    }

    /// Starts to receive into `range` of the memory, from a rank or from any.
    pub fn receive(
        &mut self,
        library: &Library,
        (channel, from, tag): (Channel, Option<usize>, u32),
        mut memory: Memory,
        range: Range<usize>,
        of: T,
    ) -> Result<(), CommError> {
        let place: *mut u8 = match &mut memory {
            Memory::Bytes(bytes) => bytes[range.clone()].as_mut_ptr(),
            Memory::Target(target) => target.at(&range),
            Memory::Piece(_) => return Err(CommError::Transport("a sent piece cannot be filled".into())),
        };
        let count = count(&range)?;
        let comm = library.communicator(channel);
        // SAFETY: as in `send`; the place is written to by this request alone, since a `Bytes` is moved in and places of
        // a target are given out once.
        let handle = unsafe {
            let mut handle = ffi::RSMPI_REQUEST_NULL;
            let byte = ffi::RSMPI_UINT8_T;
            let peer = from.map_or(ffi::RSMPI_ANY_SOURCE, |rank| rank as c_int);
            let code = ffi::MPI_Irecv(place.cast(), count, byte, peer, tag as c_int, comm, &mut handle);
            check(code, "receive")?;
            handle
        };
        self.handles.push(handle);
        self.entries.push((memory, of));
        Ok(())
    }

    /// Lets MPI work, and hands back what is complete.
    pub fn poll(&mut self) -> Result<Vec<Completed<T>>, CommError> {
        let len = self.handles.len();
        self.indices.resize(len, 0);
        // SAFETY: a status is plain numbers, for which zero is a value.
        self.statuses.resize_with(len, || unsafe { std::mem::zeroed() });
        let mut done: c_int = 0;
        // SAFETY: all three arrays have `len` entries.
        let code = unsafe {
            ffi::MPI_Testsome(
                len as c_int,
                self.handles.as_mut_ptr(),
                &mut done,
                self.indices.as_mut_ptr(),
                self.statuses.as_mut_ptr(),
            )
        };
        check(code, "go on")?;
        if done <= 0 {
            return Ok(Vec::new());
        }
        let mut found: Vec<(usize, usize)> =
            self.indices[..index(done)].iter().enumerate().map(|(nth, at)| (index(*at), nth)).collect();
        // From the back, so that removing one moves none of the others.
        found.sort_unstable_by(|a, b| b.cmp(a));
        let mut completed = Vec::with_capacity(found.len());
        for (at, nth) in found {
            self.handles.swap_remove(at);
            let (memory, of) = self.entries.swap_remove(at);
            let status = &self.statuses[nth];
            let mut bytes: c_int = 0;
            // SAFETY: the status was written by `MPI_Testsome`.
            unsafe { ffi::MPI_Get_count(status, ffi::RSMPI_UINT8_T, &mut bytes) };
            completed.push(Completed { memory, of, bytes: index(bytes), source: index(status.MPI_SOURCE) });
        }
        Ok(completed)
    }

    /// Takes back all requests that nobody will answer.
    pub fn cancel(&mut self) {
        for handle in &mut self.handles {
            // SAFETY: the handle is that of an active request; cancelled or complete, the wait returns.
            unsafe {
                ffi::MPI_Cancel(handle);
                ffi::MPI_Wait(handle, ffi::RSMPI_STATUS_IGNORE);
            }
        }
        self.handles.clear();
        self.entries.clear();
    }
}

impl<T> Drop for Requests<T> {
    fn drop(&mut self) {
        // Whatever is still under way may be touched by the library at any time: its memory is never let go.
        std::mem::forget(std::mem::take(&mut self.entries));
    }
}

fn count(range: &Range<usize>) -> Result<c_int, CommError> {
    c_int::try_from(range.len())
        .map_err(|_| CommError::Transport(format!("{} bytes are too many for one MPI message", range.len())))
}
