//! The simulator against what is known: formulas of bubbles, closed forms, replicas that are equal, overlap, links, groups.

use proptest::prelude::*;
use unisono_plan::KeptActivations;
use unisono_plan::ModelConfig;
use unisono_plan::schedule::{Chunk, EngineStep, ExchangeKind, Op, Schedule, ScheduleKind};
use unisono_plan::simulate::*;

fn stages_of(kind: ScheduleKind) -> usize {
    match kind {
        ScheduleKind::OneForwardOneBackward | ScheduleKind::ZeroBubble => 1,
        ScheduleKind::Interleaved => 3,
        ScheduleKind::DualPipeV => 2,
    }
}

/// A stage whose passes alternate between kernels and exchanges.
fn stage([forward_s, input_s, weights_s]: [f64; 3], exchange_s: f64) -> StageCosts {
    let layers = |seconds: f64| {
        let half =
            [Segment::compute("kernels", seconds / 2.0), Segment::exchange("tokens", exchange_s / 2.0)];
        half.repeat(2)
    };
    StageCosts {
        forward: layers(forward_s),
        input: layers(input_s),
        weights: vec![Segment::compute("weights", weights_s)],
        backward: layers(input_s + weights_s),
        reduce: Vec::new(),
    }
}

/// One rank's passes, with its overlapped pairs as the simulation of one rank has them.
fn passes(schedule: &Schedule, costs: &UniformCosts, rank: usize) -> PassTimes {
    let sum = |segments: &[Segment]| segments.iter().map(|segment| segment.seconds).sum::<f64>();
    let held = schedule.stages_of(rank).into_iter().map(|stage| &costs.stages[usize::from(stage)]);
    let mut times = held.fold(PassTimes::default(), |times, stage| PassTimes {
        forward_s: times.forward_s + sum(&stage.forward),
        input_s: times.input_s + sum(&stage.input),
        weights_s: times.weights_s + sum(&stage.weights),
        overlapped_s: 0.0,
    });
    let stages: Vec<_> =
        schedule.stages_of(rank).iter().map(|s| costs.stages[usize::from(*s)].clone()).collect();
    if stages.len() == 2 {
        let alone = UniformCosts { stages, ..costs.clone() };
        let one = ScheduleKind::DualPipeV.schedule(1, 2, 4).expect("allowed sizes");
        let simulated = simulate(&one, &alone, Replicas::all(1), true).expect("runs");
        let pairs: Vec<usize> =
            (0..one.ranks[0].len()).filter(|i| matches!(one.ranks[0][*i], Op::Overlapped { .. })).collect();
        times.overlapped_s = pairs[1..3].iter().map(|op| extent(&simulated, *op)).sum();
    }
    times
}

/// Seconds from the first to the last moment of an op of rank 0.
fn extent(simulated: &Simulated, op: usize) -> f64 {
    let spans = simulated.spans.iter().filter(|span| span.rank == 0 && span.op as usize == op);
    let (start, end) = spans.fold((f64::INFINITY, 0.0f64), |(start, end), span| {
        (start.min(span.start_s), end.max(span.start_s + span.seconds))
    });
    end - start
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * a.abs().max(b.abs()).max(1.0)
}

proptest! {
    #[test]
    fn the_bubble_is_the_formulas(
        kind in prop::sample::select(&ScheduleKind::ALL[..]),
        ranks in 1usize..9, rounds in 2usize..6, forward in 1.0f64..2.0, more in 0.0f64..1.0, share in 0.1f64..1.0,
    ) {
        let v = stages_of(kind);
        let micro_batches = ranks * rounds;
        // The zero-bubble formulas hold while weight gradients are the shortest; DualPipeV's takes F = I.
        let input = if kind == ScheduleKind::DualPipeV { forward } else { forward + more };
        let weights = forward * share;
        let each = v as f64;
        let schedule = kind.schedule(ranks, v, micro_batches).expect("allowed sizes");
        let stage = StageCosts::kernels(forward / each, input / each, weights / each);
        let costs = UniformCosts { stages: vec![stage; ranks * v], ..UniformCosts::default() };
        let simulated = simulate(&schedule, &costs, Replicas::all(1), true).expect("runs");
        let work = forward + input + weights;
        let formula = kind.bubble_s(ranks, v, forward, input, weights, work);
        for (rank, parts) in simulated.ranks.iter().zip(step_parts(&schedule, &simulated)) {
            let idle = rank.idle_s(simulated.seconds);
            prop_assert!(close(idle, formula), "{kind} {ranks}x{micro_batches}: {idle} is not {formula}");
            let [passes @ .., other, waiting] = parts.seconds();
            prop_assert!(close(passes.iter().sum(), work * micro_batches as f64), "{kind}: {parts:?}");
            prop_assert!(other == 0.0 && close(waiting, formula), "{kind}: {parts:?}, not {formula}");
        }
    }

    #[test]
    fn overlap_shrinks_dual_pipe_v_as_its_formula_says(
        ranks in 2usize..9, rounds in 2usize..6, pass in 1.0f64..2.0, share in 0.1f64..1.0, exchange in 0.0f64..0.3,
    ) {
        let schedule = ScheduleKind::DualPipeV.schedule(ranks, 2, ranks * rounds).expect("allowed sizes");
        let stages = vec![stage([pass, pass, pass * share], exchange); 2 * ranks];
        let costs = UniformCosts { stages, ..UniformCosts::default() };
        let simulated = simulate(&schedule, &costs, Replicas::all(1), false).expect("runs");
        let times = passes(&schedule, &costs, 0);
        let closed = pipeline_time(ScheduleKind::DualPipeV, 2, ranks * rounds, &vec![times; ranks], 0.0);
        let PassTimes { forward_s, input_s, weights_s, overlapped_s } = times;
        let formula =
            ScheduleKind::DualPipeV.bubble_s(ranks, 2, forward_s, input_s, weights_s, overlapped_s);
        prop_assert!(close(closed.bubble_s, formula));
        prop_assert!(close(simulated.seconds, closed.total_s), "{} is not {}", simulated.seconds, closed.total_s);
    }

    #[test]
    fn closed_forms_are_within_5_percent_of_the_simulation(
        kind in prop::sample::select(&ScheduleKind::ALL[..]),
        ranks in 1usize..9, rounds in 4usize..9, input in 1.0f64..1.3, weights in 0.4f64..1.0,
        exchange in 0.0f64..0.3, transfer in 0.0f64..0.05, last in 0.9f64..1.2,
    ) {
        let v = stages_of(kind);
        let micro_batches = ranks * rounds;
        let mut stages = vec![stage([1.0, input, weights], exchange); ranks * v];
        stages[ranks * v - 1] = stage([last, last * input, last * weights], exchange);
        let costs = UniformCosts {
            stages,
            transfer: Transfer { seconds: transfer, link: None },
            ..UniformCosts::default()
        };
        let schedule = kind.schedule(ranks, v, micro_batches).expect("allowed sizes");
        let simulated = simulate(&schedule, &costs, Replicas::all(1), false).expect("runs");
        let times: Vec<_> = (0..ranks).map(|rank| passes(&schedule, &costs, rank)).collect();
        let closed = pipeline_time(kind, v, micro_batches, &times, transfer);
        let error = closed.total_s / simulated.seconds - 1.0;
        prop_assert!(error.abs() < 0.05, "{kind} {ranks}x{micro_batches}: {:+.2}%", 100.0 * error);
    }

    #[test]
    fn one_replica_stands_for_all_that_are_equal(
        kind in prop::sample::select(&ScheduleKind::ALL[..]), ranks in 1usize..5, groups in 1usize..4,
        exchange in 0.01f64..0.5, capacity in 1.0f64..4.0, slowdown in 0.0f64..0.3, sharers in 1u32..4,
    ) {
        let v = stages_of(kind);
        let replicas = 4 * groups;
        let mut one = stage([1.0, 1.1, 0.7], exchange);
        for segments in [&mut one.forward, &mut one.input, &mut one.backward] {
            for segment in segments.iter_mut().filter(|segment| segment.lane == Lane::Communication) {
                (segment.group, segment.link) = (4, Some(0));
            }
        }
        one.reduce = vec![Segment { group: replicas as u32, link: Some(0), ..Segment::exchange("reduce", 0.4) }];
        let costs = UniformCosts {
            stages: vec![one; ranks * v],
            transfer: Transfer { seconds: 0.05, link: Some(0) },
            links: vec![LinkClass { name: "uplink", ranks: 1 << (sharers % 3), capacity }],
            slowdown,
            ..UniformCosts::default()
        };
        let schedule = kind.schedule(ranks, v, 2 * ranks).expect("allowed sizes").then_update();
        let all = simulate(&schedule, &costs, Replicas::all(replicas), false).expect("runs");
        let one = simulate(&schedule, &costs, Replicas::symmetric(replicas), false).expect("runs");
        prop_assert!(close(all.seconds, one.seconds), "{} is not {}", all.seconds, one.seconds);
        for (index, rank) in all.ranks.iter().enumerate() {
            let alone = one.ranks[index % ranks];
            prop_assert!(close(rank.compute_s, alone.compute_s) && close(rank.exposed_s, alone.exposed_s));
        }
    }
}

/// Two stages on one rank and one overlapped pair: forward of the first with backward of the second.
fn one_pair() -> Schedule {
    let chunk = |stage, micro_batch| Chunk { stage, micro_batch };
    Schedule {
        micro_batches: 2,
        placement: vec![0, 0],
        ranks: vec![vec![
            Op::Forward(chunk(0, 0)),
            Op::Forward(chunk(1, 0)),
            Op::Overlapped { forward: chunk(0, 1), backward: chunk(1, 0) },
        ]],
    }
}

#[test]
fn an_overlapped_pair_hides_exchanges_and_pays_the_slowdown() {
    let free = StageCosts { backward: vec![Segment::compute("b", 4.0)], ..StageCosts::default() };
    let forward = vec![Segment::exchange("x", 2.0), Segment::compute("f", 1.0)];
    let mut costs = UniformCosts {
        stages: vec![StageCosts { forward, ..free.clone() }, free],
        ..UniformCosts::default()
    };
    let pair = |costs: &UniformCosts| {
        let simulated = simulate(&one_pair(), costs, Replicas::all(1), true).expect("runs");
        extent(&simulated, 2)
    };
    assert_eq!(pair(&costs), 5.0);
    assert_eq!(pair(&costs), overlapped_time(5.0, 2.0, 0.0));
    // Two of the four seconds of backward run beside the exchange at four fifths of their speed.
    costs.slowdown = 0.25;
    assert!(close(pair(&costs), 5.4) && close(overlapped_time(5.0, 2.0, 0.25), 5.4));
}

#[test]
fn transfers_over_one_link_take_turns_of_its_speed() {
    let schedule = ScheduleKind::OneForwardOneBackward.schedule(2, 1, 1).expect("allowed sizes");
    let link = |ranks| LinkClass { name: "uplink", ranks, capacity: 1.0 };
    let mut costs = UniformCosts {
        stages: vec![StageCosts::kernels(1.0, 1.0, 1.0); 2],
        transfer: Transfer { seconds: 0.5, link: Some(0) },
        links: vec![link(1)],
        ..UniformCosts::default()
    };
    let seconds =
        |costs: &UniformCosts| simulate(&schedule, costs, Replicas::all(4), false).expect("runs").seconds;
    assert_eq!(seconds(&costs), 6.0 + 2.0 * 0.5);
    // Four replicas send at once over what one alone would fill.
    costs.links = vec![link(4)];
    assert_eq!(seconds(&costs), 6.0 + 2.0 * 2.0);
}

/// The second replica's experts take longer.
struct Skewed(UniformCosts);

impl Costs for Skewed {
    fn segments(&self, replica: usize, rank: usize, op: &Op) -> &[Segment] {
        if replica == 1 && matches!(op, Op::Forward(_)) {
            return &self.0.stages[rank].input;
        }
        self.0.segments(replica, rank, op)
    }

    fn transfer(&self, replica: usize, from_stage: u16, to_stage: u16) -> Transfer {
        self.0.transfer(replica, from_stage, to_stage)
    }
}

#[test]
fn a_group_waits_for_its_slowest_member() {
    let exchange = Segment { group: 2, ..Segment::exchange("tokens", 0.5) };
    let one = StageCosts {
        forward: vec![Segment::compute("experts", 1.0), exchange],
        input: vec![Segment::compute("experts", 3.0), exchange],
        ..StageCosts::default()
    };
    let schedule = ScheduleKind::OneForwardOneBackward.schedule(1, 1, 2).expect("allowed sizes");
    let costs = Skewed(UniformCosts { stages: vec![one], ..UniformCosts::default() });
    let simulated = simulate(&schedule, &costs, Replicas::all(4), false).expect("runs");
    let ends: Vec<f64> = simulated.ranks.iter().map(|rank| rank.end_s).collect();
    assert_eq!(ends, [7.0, 7.0, 3.0, 3.0]);
    let waiting = simulated.ranks[0];
    assert_eq!((waiting.compute_s, waiting.communication_s, waiting.exposed_s), (2.0, 5.0, 5.0));
}

const ENGINE: EngineStep = EngineStep {
    waves: 1,
    turns: 1,
    kept: KeptActivations::All,
    zero: 1,
    overlap: true,
    every_turn: false,
    reduce_stages: 1,
};

/// A second for every kernel; two for the rows of a dispatch.
struct EngineCosts([Segment; 2]);

impl Costs for EngineCosts {
    fn segments(&self, _replica: usize, _rank: usize, op: &Op) -> &[Segment] {
        match op {
            Op::Kernel(_) => &self.0[..1],
            Op::Start(exchange) if exchange.kind == ExchangeKind::Dispatch => &self.0[1..],
            _ => &[],
        }
    }

    fn transfer(&self, _replica: usize, _from_stage: u16, _to_stage: u16) -> Transfer {
        Transfer::default()
    }
}

#[test]
fn the_engines_step_overlaps_dispatch_with_shared_experts() {
    let model = ModelConfig { num_hidden_layers: 2, ..ModelConfig::default() };
    let schedule = ENGINE.schedule(&model);
    let costs = EngineCosts([Segment::compute("kernel", 1.0), Segment::exchange("dispatch", 2.0)]);
    let simulated = simulate(&schedule, &costs, Replicas::all(2), false).expect("runs");
    let kernels = schedule.ranks[0].iter().filter(|op| matches!(op, Op::Kernel(_))).count() as f64;
    assert_eq!(simulated.ranks[0].exposed_s, 2.0, "one second of each dispatch is hidden");
    assert_eq!(simulated.seconds, kernels + 2.0);
}

#[test]
fn a_simulated_step_draws_and_traces_every_op() {
    let schedule = ScheduleKind::DualPipeV.schedule(2, 2, 4).expect("allowed sizes");
    let costs = UniformCosts { stages: vec![stage([1.0, 1.0, 1.0], 0.2); 4], ..UniformCosts::default() };
    let simulated = simulate(&schedule, &costs, Replicas::all(1), true).expect("runs");
    assert_eq!(simulated, simulate(&schedule, &costs, Replicas::all(1), true).expect("runs"));
    let (drawing, cut) = svg(&schedule, &simulated, usize::MAX);
    let ops = schedule.ranks.iter().flatten();
    let halves: usize = ops.map(|op| if matches!(op, Op::Overlapped { .. }) { 2 } else { 1 }).sum();
    assert_eq!(drawing.matches("<rect").count(), halves);
    assert!(drawing.contains("<title>W3@0</title>") && drawing.ends_with("</svg>\n"));
    let events: Vec<_> = trace_events(&schedule, &simulated).collect();
    assert_eq!(events.len(), simulated.spans.len());
    let compute: f64 =
        events.iter().filter(|e| e.rank == 1 && e.lane == Lane::Compute).map(|e| e.seconds).sum();
    assert!(close(compute, simulated.ranks[1].compute_s) && close(compute, 24.0));
    assert_eq!(cut, None);
    let (some, cut) = svg(&schedule, &simulated, 8);
    let (cut, boxes) = (cut.expect("too many"), drawing.matches("<title>").count());
    assert_eq!((cut.all, cut.kept), (boxes, some.matches("<title>").count()));
    assert!(cut.kept.abs_diff(8) <= 4 && boxes > 16, "{cut:?}");
    assert!(some.contains("<title>F0@0</title>") && some.contains(&format!("{} of {boxes} boxes", cut.kept)));
    let end = |text: &str| {
        text.split("width=\"")
            .filter_map(|rest| rest.split('"').next()?.parse::<f64>().ok())
            .fold(0.0, f64::max)
    };
    assert!(end(&some) > end(&drawing), "what is left is drawn larger");
}

#[test]
fn a_contradiction_stands_still_with_a_name() {
    let mut schedule = ScheduleKind::OneForwardOneBackward.schedule(2, 1, 2).expect("allowed sizes");
    schedule.ranks[0].swap(0, 2);
    let costs =
        UniformCosts { stages: vec![StageCosts::kernels(1.0, 1.0, 1.0); 2], ..UniformCosts::default() };
    let error = simulate(&schedule, &costs, Replicas::all(1), false).expect_err("backward before forward");
    assert_eq!(
        error.to_string(),
        "the schedule stands still: replica 0, pipeline rank 0 waits at op 0, B0@0; `Schedule::check` names the \
         contradiction"
    );
}
