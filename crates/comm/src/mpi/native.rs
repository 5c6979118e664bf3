//! The MPI library's own collectives, for benchmarks only: their sums depend on the library's choice of algorithm.

use std::ffi::c_int;

use mpi::ffi;

use super::engine::Engine;
use super::ranks::MpiRanks;
use super::raw::Channel;
use crate::bench::{Collective, Native};
use crate::error::CommError;
use crate::transport::NativeSums;

impl Native for MpiRanks {
    fn name(&self) -> String {
        self.library().to_owned()
    }

    fn run(&self, collective: Collective, send: &[f32], receive: &mut [f32]) -> Result<(), CommError> {
        let size = self.size();
        let (whole, part) = match collective {
            Collective::AllGather => (receive.len(), send.len()),
            _ => (send.len(), send.len() / size),
        };
        let needed = match collective {
            Collective::ReduceScatter => part,
            _ => whole,
        };
        if receive.len() < needed || whole != part * size {
            return Err(CommError::Transport(format!("{} has wrong buffers", collective.name())));
        }
        let count = |len: usize| {
            c_int::try_from(len).map_err(|_| CommError::Transport(format!("{len} elements are too many")))
        };
        let (whole, part) = (count(whole)?, count(part)?);
        let counts = vec![part; size];
        let places: Vec<c_int> = (0..size as c_int).map(|rank| rank * part).collect();
        let (from, to) = (send.as_ptr().cast(), receive.as_mut_ptr().cast());
        let (counts, places) = (counts.as_ptr(), places.as_ptr());
        // Held while the library works: it is called by one thread at a time.
        let state = self.engine().lock();
        let comm = state.library.communicator(Channel::Data);
        // SAFETY: `send` and `receive` have the elements that counts and places say, as checked above, and `comm` is
        // valid; all calls are blocking, so no memory is touched after they return.
        let code = unsafe {
            let (float, sum) = (ffi::RSMPI_FLOAT, ffi::RSMPI_SUM);
            match collective {
                Collective::AllGather => ffi::MPI_Allgather(from, part, float, to, part, float, comm),
                Collective::ReduceScatter => ffi::MPI_Reduce_scatter_block(from, to, part, float, sum, comm),
                Collective::AllReduce | Collective::ReduceThenGather => {
                    ffi::MPI_Allreduce(from, to, whole, float, sum, comm)
                }
                Collective::AllToAll => {
                    ffi::MPI_Alltoallv(from, counts, places, float, to, counts, places, float, comm)
                }
                Collective::Broadcast => ffi::MPI_Bcast(to, whole, float, 0, comm),
            }
        };
        if code == 0 {
            Ok(())
        } else {
            Err(CommError::Transport(format!("MPI's {} failed", collective.name())))
        }
    }

    fn exchange(&self, from: (&[f32], &[usize]), to: (&mut [f32], &[usize])) -> Result<(), CommError> {
        let size = self.size();
        let refuse = || CommError::Transport("the library's exchange has wrong buffers".into());
        // Counts and places of each rank's values, in the library's numbers.
        let list = |len: usize, counts: &[usize]| {
            let ends = counts.iter().scan(0usize, |end, count| {
                *end = end.checked_add(*count)?;
                Some(*end)
            });
            let ends: Vec<c_int> = ends.map_while(|end| c_int::try_from(end).ok()).collect();
            let whole = ends.len() == size && counts.len() == size;
            if !whole || ends.last().is_some_and(|end| *end as usize > len) {
                return Err(refuse());
            }
            let counts: Vec<c_int> = counts.iter().map(|count| *count as c_int).collect();
            let places: Vec<c_int> = ends.iter().zip(&counts).map(|(end, count)| end - count).collect();
            Ok((counts, places))
        };
        let (sent, send_places) = list(from.0.len(), from.1)?;
        let (received, receive_places) = list(to.0.len(), to.1)?;
        let state = self.engine().lock();
        let comm = state.library.communicator(Channel::Data);
        // SAFETY: both buffers have the elements that counts and places say, as checked above, and `comm` is valid; the
        // call is blocking, so no memory is touched after it returns.
        let code = unsafe {
            let float = ffi::RSMPI_FLOAT;
            let (send, receive) = (from.0.as_ptr().cast(), to.0.as_mut_ptr().cast());
            let (sent, send_places) = (sent.as_ptr(), send_places.as_ptr());
            let (received, receive_places) = (received.as_ptr(), receive_places.as_ptr());
            ffi::MPI_Alltoallv(send, sent, send_places, float, receive, received, receive_places, float, comm)
        };
        if code == 0 { Ok(()) } else { Err(CommError::Transport("MPI's all-to-all failed".into())) }
    }
}

impl NativeSums for Engine {
    fn reduce_scatter(&self, send: &[f32], counts: &[usize], out: &mut [f32]) -> Result<(), CommError> {
        let refuse = || CommError::Transport("the library's reduce-scatter has wrong buffers".into());
        let fits = counts.len() == self.size && out.len() >= counts[self.rank];
        if !fits || counts.iter().sum::<usize>() != send.len() {
            return Err(refuse());
        }
        let counts = counts.iter().map(|&count| c_int::try_from(count));
        let counts: Vec<c_int> = counts.collect::<Result<_, _>>().map_err(|_| refuse())?;
        let state = self.lock();
        let comm = state.library.communicator(Channel::Data);
        // SAFETY: `send` and `out` have the elements that `counts` says, one count a rank, as checked above; the call is
        // blocking, so no memory is touched after it returns.
        let code = unsafe {
            let (from, to) = (send.as_ptr().cast(), out.as_mut_ptr().cast());
            ffi::MPI_Reduce_scatter(from, to, counts.as_ptr(), ffi::RSMPI_FLOAT, ffi::RSMPI_SUM, comm)
        };
        if code == 0 { Ok(()) } else { Err(CommError::Transport("MPI's reduce-scatter failed".into())) }
    }
}
