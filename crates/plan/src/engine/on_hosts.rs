//! The engine's step op by op: the list that it executes, simulated on one host or on several.
//!
//! Kernels, and what a rank's cores do to bring bytes about, take what the machine's fit says. What travels between hosts takes
//! the communication lane meanwhile, from where the list starts an exchange to where it waits for it.

use std::collections::HashMap;

use super::EngineLayout;
use super::hosts::HostCluster;
use super::machine::{LocalMachine, LocalPrice};
use super::network::Network;
use super::work::{OTHER, Phase, StepRows, Walk, exchange_phase, kernel_phase};
use crate::pricing::SimulatedStep;
use crate::schedule::{Op, Schedule};
use crate::simulate::{Costs, Lane, Replicas, Segment, Simulated, Transfer, simulate};

/// What the ops of one rank take; every rank has the same list.
struct OpCosts(HashMap<Op, Segment>);

impl Costs for OpCosts {
    fn segments(&self, _replica: usize, _rank: usize, op: &Op) -> &[Segment] {
        self.0.get(op).map_or(&[], std::slice::from_ref)
    }

    fn transfer(&self, _replica: usize, _from_stage: u16, _to_stage: u16) -> Transfer {
        Transfer::default()
    }
}

impl LocalMachine {
    /// The step of a layout op by op, with its spans; on the hosts that its ranks are on if there are several. What
    /// no op stands for is not in it: accumulators that begin with zeros, and what goes on between kernels.
    pub fn simulate(
        &self,
        layout: &EngineLayout,
        rows: StepRows,
        threads: usize,
        hosts: Option<&HostCluster>,
    ) -> SimulatedStep {
        let schedule = layout.step.schedule(&layout.model);
        let costs = self.op_costs(layout, rows, threads, hosts, &schedule);
        let simulated = simulate(&schedule, &costs, Replicas::all(1), true)
            .expect("the engine's list finishes only what it has started");
        SimulatedStep { schedule, simulated }
    }

    /// The step of a layout whose ranks are on several of `hosts`: as simulated, and what no op stands for.
    pub fn price_on(
        &self,
        hosts: &HostCluster,
        layout: &EngineLayout,
        rows: StepRows,
        threads: usize,
    ) -> LocalPrice {
        let SimulatedStep { schedule, simulated } = self.simulate(layout, rows, threads, Some(hosts));
        let (mode, stretch) = self.mode_for(layout.ranks_per_host(), threads);
        let between_ops = Walk::new(layout, rows).between_ops();
        let other_s = stretch * mode.phase_s(&self.products, OTHER, &between_ops);
        let mut phases = phases(&schedule, &simulated);
        match phases.iter_mut().find(|(phase, _)| *phase == OTHER) {
            Some((_, seconds)) => *seconds += other_s,
            None => phases.push((OTHER, other_s)),
        }
        let on = |lane: Lane| -> f64 {
            simulated.spans.iter().filter(|span| span.lane == lane).map(|span| span.seconds).sum()
        };
        let waited_s = (simulated.seconds - on(Lane::Compute)).max(0.0);
        let step_s = simulated.seconds + other_s;
        LocalPrice {
            step_s,
            interval_s: self.interval(step_s),
            phases,
            network_s: on(Lane::Communication),
            waited_s,
        }
    }

    fn op_costs(
        &self,
        layout: &EngineLayout,
        rows: StepRows,
        threads: usize,
        hosts: Option<&HostCluster>,
        schedule: &Schedule,
    ) -> OpCosts {
        let (mode, stretch) = self.mode_for(layout.ranks_per_host(), threads);
        let walk = Walk::new(layout, rows);
        let mut network = hosts.map(|hosts| Network::new(hosts, layout, rows.slot));
        let seconds = |phase: Phase, work| stretch * mode.phase_s(&self.products, phase, &work);
        let mut costs = HashMap::new();
        for op in schedule.ranks.iter().flatten() {
            match op {
                Op::Kernel(kernel) => {
                    let phase = kernel_phase(kernel.kind);
                    let cost = || Segment::compute(phase.1, seconds(phase, walk.kernel(kernel)));
                    costs.entry(*op).or_insert_with(cost);
                }
                Op::Start(exchange) => {
                    let phase = exchange_phase(exchange.kind);
                    let on_network = network
                        .as_mut()
                        .map(|network| network.seconds(exchange.kind, usize::from(exchange.site.layer)));
                    if let Some(seconds) = on_network.filter(|seconds| *seconds > 0.0) {
                        costs.insert(*op, Segment::exchange(phase.1, seconds));
                    }
                    let own = Segment::compute(phase.1, seconds(phase, walk.exchange(exchange)));
                    costs.insert(Op::Finish(*exchange), own);
                }
                _ => {}
            }
        }
        OpCosts(costs)
    }
}

/// Seconds of each phase on the compute lane, waiting for exchanges included.
fn phases(schedule: &Schedule, simulated: &Simulated) -> Vec<(Phase, f64)> {
    let mut phases: Vec<(Phase, f64)> = Vec::new();
    let mut before_s = 0.0;
    for span in simulated.spans.iter().filter(|span| span.lane == Lane::Compute) {
        let phase = match schedule.ranks[0][span.op as usize] {
            Op::Finish(exchange) => exchange_phase(exchange.kind),
            _ => (false, span.name),
        };
        let end_s = span.start_s + span.seconds;
        match phases.iter_mut().find(|(known, _)| *known == phase) {
            Some((_, seconds)) => *seconds += end_s - before_s,
            None => phases.push((phase, end_s - before_s)),
        }
        before_s = end_s;
    }
    phases
}
