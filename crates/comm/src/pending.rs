//! Started calls.

use std::any::Any;
use std::marker::PhantomData;
use std::sync::Arc;

use bytemuck::Pod;

use crate::communicator::{Core, Group};
use crate::error::CommError;
use crate::flight::CallState;
use crate::ledger::Volume;
use crate::transport::{ByteBuffer, Landing, Ticket};

/// A started call; [`Pending::finish`] waits for it and hands the receive buffer back.
///
/// Calls may be finished in any order. One that is dropped instead is given up: its buffer is lost, and what peers sent
/// is not taken.
#[must_use = "a started call must be finished"]
pub struct Pending<R> {
    core: Arc<Core>,
    group: Arc<Group>,
    kind: &'static str,
    volume: Volume,
    flight: u64,
    /// None once it is finished.
    ticket: Option<Ticket>,
    take: Take<R>,
}

/// How the caller's buffer comes back.
pub(crate) enum Take<R> {
    /// Out of the landing.
    Landed(fn(Landing) -> Option<R>),
    /// It was shared for sending.
    Shared(Arc<R>),
}

impl<R> Pending<R> {
    pub(crate) fn new(
        core: Arc<Core>,
        group: Arc<Group>,
        kind: &'static str,
        volume: Volume,
        flight: u64,
        ticket: Ticket,
        take: Take<R>,
    ) -> Self {
        Self { core, group, kind, volume, flight, ticket: Some(ticket), take }
    }

    /// Waits until the call is done: all that was expected has arrived, all that was sent was taken, and no clone of
    /// the send buffers is left with the transport or a peer.
    ///
    /// # Errors
    /// [`CommError::Failed`] if the run fails.
    pub fn finish(mut self) -> Result<R, CommError> {
        let Some(ticket) = self.ticket.take() else {
            return Err(CommError::Transport("a call was finished twice".into()));
        };
        let recorder = self.core.transport.recorder();
        recorder.set(self.flight, CallState::Waiting);
        let done = match self.core.transport.finish(ticket) {
            Ok(done) => done,
            Err(error) => {
                recorder.set(self.flight, CallState::Failed);
                return Err(error);
            }
        };
        recorder.set(self.flight, CallState::Finished);
        let group = &self.group;
        self.core.book().add(self.kind, &group.name, group.farthest, &self.volume, done.wait, &done.moving);
        // Replaced by a take that gives nothing, since a type with a Drop cannot be taken apart.
        let taken = match std::mem::replace(&mut self.take, Take::Landed(|_| None)) {
            Take::Landed(take) => take(done.landing),
            Take::Shared(buffer) => Arc::try_unwrap(buffer).ok(),
        };
        taken
            .ok_or_else(|| CommError::Transport(format!("{} gave another buffer back or kept it", self.kind)))
    }
}

impl<R> Drop for Pending<R> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.core.transport.cancel(ticket);
            self.core.transport.recorder().set(self.flight, CallState::Dropped);
        }
    }
}

/// A receive buffer with its element type.
struct Owned<R, T> {
    buffer: R,
    element: PhantomData<fn() -> T>,
}

impl<R: AsMut<[T]> + 'static, T: Pod> ByteBuffer for Owned<R, T> {
    fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(self.buffer.as_mut())
    }
}

pub(crate) fn own<T: Pod, R: AsMut<[T]> + Send + 'static>(buffer: R) -> Box<dyn ByteBuffer + Send> {
    Box::new(Owned { buffer, element: PhantomData::<fn() -> T> })
}

/// The counterpart of [`own`].
pub(crate) fn disown<T: Pod, R: AsMut<[T]> + Send + 'static>(landing: Landing) -> Option<R> {
    let Landing::Copy { buffer, .. } = landing else { return None };
    let any: Box<dyn Any> = buffer;
    any.downcast::<Owned<R, T>>().ok().map(|owned| owned.buffer)
}
