//! Every schedule is complete, free of deadlock and within its stated activations in flight; the texts are as drawn here.

use proptest::prelude::*;
use unisono_plan::schedule::{
    Chunk, ChunkBytes, EngineStep, Exchange, ExchangeKind, InFlight, KernelKind, Op, Schedule, ScheduleKind,
};
use unisono_plan::{KeptActivations, ModelConfig};

/// Sizes that a kind allows, made from free numbers.
fn allowed(kind: ScheduleKind, ranks: usize, stages: usize, extra: usize) -> (usize, usize, usize) {
    match kind {
        ScheduleKind::OneForwardOneBackward | ScheduleKind::ZeroBubble => (ranks, 1, 1 + extra),
        ScheduleKind::Interleaved => (ranks, 1 + stages, ranks * (1 + extra / ranks)),
        ScheduleKind::DualPipeV => (ranks, 2, 2 * ranks + extra),
    }
}

proptest! {
    #[test]
    fn every_schedule_is_complete_without_deadlock_and_holds_what_it_says(
        kind in prop::sample::select(&ScheduleKind::ALL[..]),
        ranks in 1usize..9, stages in 1usize..4, extra in 0usize..24,
    ) {
        let (ranks, stages, micro_batches) = allowed(kind, ranks, stages, extra);
        let schedule = kind.schedule(ranks, stages, micro_batches).expect("allowed sizes");
        schedule.check().map_err(|error| TestCaseError::fail(format!("{kind}: {error}\n{schedule}")))?;
        let whole = schedule.clone().then_update();
        whole.check().expect("the update adds exchanges in pairs");
        let in_shards = whole.gathering_each_pass();
        in_shards.check().expect("gathers come in pairs");
        for ops in &in_shards.ranks {
            let uses = ops.iter().filter(|op| op.forward().or(op.backward()).is_some()).count();
            let gather = |op: &&Op| matches!(op, Op::Start(e) if e.kind == ExchangeKind::GatherParameters);
            prop_assert_eq!(ops.iter().filter(gather).count(), uses);
        }
        for rank in 0..ranks {
            let stated = kind.in_flight(ranks, stages, micro_batches, rank);
            prop_assert_eq!(schedule.in_flight(rank), stated, "{} rank {}\n{}", kind, rank, schedule);
        }
    }

    #[test]
    fn peaks_in_closed_form_are_those_of_the_ops(
        kind in prop::sample::select(&ScheduleKind::ALL[..]),
        ranks in 1usize..9, stages in 1usize..4, extra in 0usize..24,
        kept in prop::array::uniform4(0u32..100), waiting in prop::array::uniform4(0u32..400),
    ) {
        let (ranks, stages, micro_batches) = allowed(kind, ranks, stages, extra);
        let schedule = kind.schedule(ranks, stages, micro_batches).expect("allowed sizes");
        let chunks: Vec<ChunkBytes> = kept.iter().zip(waiting).take(stages).map(|(kept, waiting)| {
            ChunkBytes { activations: f64::from(*kept), weight_operands: f64::from(waiting) }
        }).collect();
        for rank in 0..ranks {
            let turn = |stage: u16| schedule.stages_of(rank).iter().position(|held| *held == stage).expect("held");
            let counted = schedule.peak_bytes(
                rank, |stage| u64::from(kept[turn(stage)]), |stage| u64::from(waiting[turn(stage)]),
            );
            let closed = kind.peak(ranks, micro_batches, rank, &chunks, 0.0).bytes(&chunks).total();
            prop_assert_eq!(closed, counted as f64, "{} rank {} {:?}\n{}", kind, rank, chunks, schedule);
        }
    }

    #[test]
    fn a_lost_or_repeated_op_is_found(
        kind in prop::sample::select(&ScheduleKind::ALL[..]),
        ranks in 1usize..5, extra in 0usize..6, rank in 0usize..5, at in 0usize..99, lose in any::<bool>(),
    ) {
        let (ranks, stages, micro_batches) = allowed(kind, ranks, 1, extra);
        let mut schedule = kind.schedule(ranks, stages, micro_batches).expect("allowed sizes");
        let ops = &mut schedule.ranks[rank % ranks];
        let at = at % ops.len();
        if lose {
            ops.remove(at);
        } else {
            ops.insert(at, ops[at]);
        }
        prop_assert!(schedule.check().is_err(), "{}", schedule);
    }
}

#[test]
fn one_forward_one_backward_reads_like_its_figure() {
    check(
        ScheduleKind::OneForwardOneBackward,
        (3, 1, 4),
        "rank 0 stages 0: F0@0 F1@0 F2@0 B0@0 F3@0 B1@0 B2@0 B3@0
rank 1 stages 1: F0@1 F1@1 B0@1 F2@1 B1@1 F3@1 B2@1 B3@1
rank 2 stages 2: F0@2 B0@2 F1@2 B1@2 F2@2 B2@2 F3@2 B3@2
",
    );
}

#[test]
fn interleaved_runs_groups_of_micro_batches_through_each_of_its_stages() {
    check(
        ScheduleKind::Interleaved,
        (2, 2, 2),
        "rank 0 stages 0 2: F0@0 F1@0 F0@2 F1@2 B0@2 B1@2 B0@0 B1@0
rank 1 stages 1 3: F0@1 F1@1 F0@3 B0@3 F1@3 B1@3 B0@1 B1@1
",
    );
}

#[test]
fn zero_bubble_puts_weight_gradients_off() {
    check(
        ScheduleKind::ZeroBubble,
        (2, 1, 4),
        "rank 0 stages 0: F0@0 F1@0 I0@0 W0@0 F2@0 I1@0 W1@0 F3@0 I2@0 W2@0 I3@0 W3@0
rank 1 stages 1: F0@1 I0@1 F1@1 I1@1 W0@1 F2@1 I2@1 W1@1 F3@1 I3@1 W2@1 W3@1
",
    );
}

#[test]
fn dual_pipe_v_overlaps_the_legs_of_the_v() {
    check(
        ScheduleKind::DualPipeV,
        (2, 2, 4),
        "rank 0 stages 0 3: F0@0 F1@0 F2@0 F0@3 I0@3 W0@3 F1@3 F3@0+B1@3 F2@3+B0@0 B2@3 F3@3+B1@0 B3@3 I2@0 W2@0 I3@0 W3@0
rank 1 stages 1 2: F0@1 F0@2 F1@1 F1@2 F2@1 B0@2 F2@2+B0@1 F3@1+B1@2 F3@2+B1@1 B2@2 B2@1 I3@2 I3@1 W3@2 W3@1
",
    );
}

fn check(kind: ScheduleKind, (ranks, stages, micro_batches): (usize, usize, usize), expected: &str) {
    let schedule = kind.schedule(ranks, stages, micro_batches).expect("allowed sizes");
    assert_eq!(schedule.to_string(), expected);
}

#[test]
fn sizes_that_do_not_fit_are_refused_with_the_rule() {
    let said = |kind: ScheduleKind, (ranks, stages, micro_batches)| {
        kind.schedule(ranks, stages, micro_batches).expect_err("refused").to_string()
    };
    assert_eq!(
        said(ScheduleKind::Interleaved, (4, 2, 6)),
        "interleaved cannot run 6 micro-batches on 4 pipeline ranks with 2 stages each: micro-batches must be a \
         multiple of 4"
    );
    assert_eq!(
        said(ScheduleKind::DualPipeV, (4, 2, 7)),
        "dualpipev cannot run 7 micro-batches on 4 pipeline ranks with 2 stages each: at least 8 micro-batches"
    );
    assert_eq!(
        said(ScheduleKind::ZeroBubble, (4, 2, 8)),
        "zb1p cannot run 8 micro-batches on 4 pipeline ranks with 2 stages each: it holds one stage a rank"
    );
}

#[test]
fn ranks_that_wait_for_each_other_are_named() {
    let chunk = |stage, micro_batch| Chunk { stage, micro_batch };
    let schedule = Schedule {
        micro_batches: 1,
        placement: vec![0, 1],
        ranks: vec![
            vec![Op::Forward(chunk(0, 0)), Op::Backward(chunk(0, 0))],
            vec![Op::Backward(chunk(1, 0)), Op::Forward(chunk(1, 0))],
        ],
    };
    let error = schedule.check().expect_err("a backward before its forward");
    assert_eq!(error.to_string(), "pipeline rank 1: I0@1 comes twice or too early");
    let swapped = Schedule {
        ranks: vec![schedule.ranks[0].iter().rev().copied().collect(), schedule.ranks[1].clone()],
        placement: vec![1, 0],
        ..schedule
    };
    assert!(swapped.check().is_err());
}

#[test]
fn peak_bytes_weigh_activations_and_what_weight_gradients_need() {
    let schedule = ScheduleKind::ZeroBubble.schedule(4, 1, 8).expect("allowed sizes");
    assert_eq!(schedule.in_flight(3), InFlight { activations: 1, weight_operands: 4 });
    assert_eq!(schedule.peak_bytes(0, |_| 100, |_| 0), 400);
    assert_eq!(schedule.peak_bytes(3, |_| 100, |_| 40), 100 + 3 * 40);
}

const DENSE_STEP: EngineStep = EngineStep {
    waves: 1,
    turns: 1,
    kept: KeptActivations::All,
    zero: 3,
    overlap: true,
    every_turn: false,
    reduce_stages: 1,
};

#[test]
fn the_engine_gathers_ahead_and_reduces_behind_what_it_computes() {
    let model = ModelConfig { num_hidden_layers: 1, num_experts: 0, ..ModelConfig::default() };
    let text = DENSE_STEP.schedule(&model).to_string();
    let expected = "rank 0 stages: start:targets@0 finish:targets@0 \
        start:gather parameters@0 finish:gather parameters@0 start:gather parameters@1 embedding:forward@0 \
        finish:gather parameters@1 start:gather parameters@2 attention:forward@0 dense ffn:forward@0 \
        finish:gather parameters@2 start:gather parameters@1 head:backward@0 \
        join gradients:weights@2 start:reduce gradients@2 \
        finish:gather parameters@1 dense ffn:backward@0 dense weights:weights@0 attention:backward@0 \
        dense weights:weights@0 join gradients:weights@1 finish:reduce gradients@2 start:reduce gradients@1 \
        embedding:weights@0 join gradients:weights@0 finish:reduce gradients@1 start:reduce gradients@0 \
        finish:reduce gradients@0 start:losses@0 finish:losses@0 gradient norm:update@0 \
        start:gradient norm@0 finish:gradient norm@0 optimizer:update@0 optimizer:update@1 optimizer:update@2 \
        start:times@0 finish:times@0\n";
    assert_eq!(text, expected);
}

proptest! {
    #[test]
    fn the_engines_step_is_whole_on_every_layout(
        layers in 1usize..4, experts in any::<bool>(), tied in any::<bool>(), waves in 1usize..4, turns in 1usize..4,
        zero in 1usize..4, overlap in any::<bool>(), every_turn in any::<bool>(), reduce_stages in 1usize..3,
    ) {
        let model = ModelConfig {
            num_hidden_layers: layers,
            first_dense: 0,
            num_experts: if experts { 16 } else { 0 },
            tie_embeddings: tied,
            ..ModelConfig::default()
        };
        let every_turn = every_turn || zero > 1;
        let kept = if overlap { KeptActivations::All } else { KeptActivations::LayerInputs };
        let step = EngineStep { waves, turns, kept, zero, overlap, every_turn, reduce_stages };
        let schedule = step.schedule(&model);
        schedule.check().expect("every exchange is finished");
        let ops = &schedule.ranks[0];
        let count = |wanted: KernelKind| {
            ops.iter().filter(|op| matches!(op, Op::Kernel(kernel) if kernel.kind == wanted)).count()
        };
        let units = layers + 2;
        let joins = if every_turn { waves * turns } else { waves };
        prop_assert_eq!((count(KernelKind::Head), count(KernelKind::JoinGradients)), (waves * turns, joins * units));
        let started = |wanted: ExchangeKind| {
            let is = |op: &&Op| matches!(op, Op::Start(Exchange { kind, .. }) if *kind == wanted);
            ops.iter().filter(is).count()
        };
        let reductions = if every_turn { turns } else { 1 } * units;
        prop_assert_eq!(started(ExchangeKind::ReduceGradients), reductions);
        let gathers = if zero < 3 { units } else { waves * turns * (2 * layers + 2 + usize::from(tied)) };
        prop_assert_eq!(started(ExchangeKind::GatherParameters), gathers);
        prop_assert_eq!(started(ExchangeKind::Dispatch), if experts { 2 * waves * turns * layers } else { 0 }
            + if experts && !overlap { waves * turns * layers } else { 0 });
    }
}
