//! Gradients added up, and parameters updated, at servers among the ranks: what MapReduce's way and parameter servers
//! have in common. For the baselines: every rank is one replica and holds every parameter whole.

use std::ops::Range;

use unisono_comm::{CommError, Communicator, Part, Pending};
use unisono_mesh::tree;
use unisono_model::Profile;
use unisono_plan::{Layout, SegmentKind, TensorSpec};
use unisono_tensor::{AdamW, Backend, Buffer, Cpu, HostBuffer};

use crate::parameters::ShardedParameters;

/// One rank's side of it.
pub(crate) struct Central {
    backend: Cpu,
    comm: Communicator,
    profile: Profile,
    tensors: Vec<Tensor>,
    /// Of the tensors that this rank serves, in order.
    served: Vec<Served>,
}

/// What is pushed and pulled at a time.
struct Tensor {
    /// The place of its segment among all, unit by unit.
    segment: usize,
    /// Its elements in the segment, without padding.
    range: Range<usize>,
    unit: usize,
    /// Its elements in the unit.
    place: Range<usize>,
    decay: bool,
    /// The rank that adds up its gradients and updates it.
    server: usize,
}

/// A tensor of this rank's, and its moments.
struct Served {
    tensor: usize,
    first: HostBuffer,
    second: HostBuffer,
}

impl Central {
    /// Zeroed moments; one server of everything, or as many as there are ranks.
    pub fn new(layout: &Layout, backend: Cpu, comm: Communicator, profile: Profile, one: bool) -> Self {
        let tensors = tensors(layout, if one { 1 } else { comm.size() });
        let own = tensors.iter().enumerate().filter(|(_, tensor)| tensor.server == comm.rank());
        let served = own.map(|(index, tensor)| Served {
            tensor: index,
            first: backend.zeros(tensor.range.len()),
            second: backend.zeros(tensor.range.len()),
        });
        Self { served: served.collect(), backend, comm, profile, tensors }
    }

    /// Sends this rank's gradients of all `segments` to the servers; the sums of what this rank serves.
    pub fn push(&self, segments: &[(SegmentKind, Vec<Part<f32>>)]) -> Result<Vec<HostBuffer>, CommError> {
        self.profile.communicate("push gradients", || {
            let send = |(tag, tensor): (usize, &Tensor)| {
                let gradient = segments[tensor.segment].1[0].slice(tensor.range.clone());
                self.comm.start_send(tensor.server, tag as u32, gradient)
            };
            let sent: Vec<Pending<()>> =
                self.tensors.iter().enumerate().map(send).collect::<Result<_, _>>()?;
            let sums = self.served.iter().map(|served| self.sum(served.tensor)).collect::<Result<_, _>>()?;
            sent.into_iter().try_for_each(Pending::finish)?;
            Ok(sums)
        })
    }

    /// What all ranks send of a tensor, added in rank order.
    fn sum(&self, tensor: usize) -> Result<HostBuffer, CommError> {
        let len = self.tensors[tensor].range.len();
        let take = |from, buffer| self.comm.recv(from, tensor as u32, buffer, 0..len);
        let mut sum = take(0, self.backend.alloc(len))?;
        let mut inbox = self.backend.alloc(len);
        for from in 1..self.comm.size() {
            inbox = take(from, inbox)?;
            self.backend.add(sum.all_mut(), inbox.all());
        }
        Ok(sum)
    }

    /// The global norm of the summed gradient, which every rank needs: servers to clip, all to know that it is finite.
    pub fn norm(&self, sums: &[HostBuffer]) -> Result<f64, CommError> {
        let mut squares = Vec::new();
        self.profile.compute("gradient norm", || {
            sums.iter().for_each(|sum| self.backend.chunk_squares(sum.all(), &mut squares));
        });
        let own = [tree::sum(&squares)];
        let all = self.profile.communicate("gradient norm", || self.comm.all_gather_values(&own))?;
        Ok(libm::sqrt(tree::sum(&all.concat())))
    }

    /// Updates what this rank serves, and pulls the rest from the other servers.
    pub fn update(
        &mut self,
        sums: &[HostBuffer],
        step: AdamW,
        parameters: &mut ShardedParameters<Cpu>,
    ) -> Result<(), CommError> {
        let Self { backend, profile, tensors, served, .. } = self;
        profile.compute("optimizer", || {
            for (Served { tensor, first, second }, sum) in served.iter_mut().zip(sums) {
                let Tensor { unit, place, decay, .. } = &tensors[*tensor];
                parameters.change(*unit, |values| {
                    let values = values.slice_mut(place.clone());
                    let runs = [(0..place.len(), *decay)];
                    backend.adamw(step, &runs, sum.all(), values, first.all_mut(), second.all_mut());
                });
            }
        });
        self.profile.communicate("pull parameters", || self.pull(parameters))
    }

    /// Every server sends what it has updated to all.
    fn pull(&self, parameters: &mut ShardedParameters<Cpu>) -> Result<(), CommError> {
        let mut under_way = Vec::with_capacity(self.tensors.len());
        for tensor in &self.tensors {
            let mut values = self.backend.alloc(tensor.range.len());
            if tensor.server == self.comm.rank() {
                let place = tensor.place.clone();
                parameters.change(tensor.unit, |unit| self.backend.copy(unit.slice(place), values.all_mut()));
            }
            under_way.push(self.comm.start_broadcast(tensor.server, values)?);
        }
        for (tensor, pending) in self.tensors.iter().zip(under_way) {
            let values = pending.finish()?;
            if tensor.server != self.comm.rank() {
                let place = tensor.place.clone();
                parameters.change(tensor.unit, |unit| self.backend.copy(values.all(), unit.slice_mut(place)));
            }
        }
        Ok(())
    }
}

/// Every tensor once, unit by unit, with servers from 0: each goes to the one that has the least so far.
fn tensors(layout: &Layout, servers: usize) -> Vec<Tensor> {
    let mut load = vec![0; servers];
    let mut tensors = Vec::new();
    let mut segment = 0;
    let mut add = |segment: usize, unit: usize, start: usize, spec: &TensorSpec| {
        let server = (0..servers).min_by_key(|server| load[*server]).unwrap_or(0);
        load[server] += spec.len();
        let range = spec.range();
        let place = start + range.start..start + range.end;
        tensors.push(Tensor { segment, range, unit, place, decay: spec.decay, server });
    };
    for unit in 0..layout.units() {
        layout.unit_tensors(unit).into_iter().for_each(|spec| add(segment, unit, 0, spec));
        let experts = layout.moe_layer_of(unit).map_or(0, |_| layout.num_experts());
        for expert in 0..experts {
            let start = layout.unit_len(unit) + expert * layout.expert_len();
            layout.expert.iter().for_each(|spec| add(segment + 1 + expert, unit, start, spec));
        }
        segment += 1 + experts;
    }
    tensors
}

/// `[server]` bytes of the parameters that it serves.
#[cfg(test)]
pub(crate) fn served_bytes(layout: &Layout, servers: usize) -> Vec<u64> {
    let mut bytes = vec![0; servers];
    for tensor in tensors(layout, servers) {
        bytes[tensor.server] += 4 * tensor.range.len() as u64;
    }
    bytes
}
