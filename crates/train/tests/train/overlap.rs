//! What runs beside what, from a step's calls and spans: where the layout overlaps, exchanges are under way while the named
//! phases compute, and otherwise never.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use unisono_comm::{FlightDeck, FlightEntry, Reason, ThreadRanks};
use unisono_data::Dataset;
use unisono_mesh::{Fold, Grid};
use unisono_model::{Lane, Profile, Span};
use unisono_plan::ModelConfig;
use unisono_tensor::Cpu;
use unisono_train::config::{LayoutConfig, TrainConfig};
use unisono_train::{RankState, RunConfig, TrainError};

const LAYERS: usize = 3;
const RANKS: usize = 2;

fn config(layout: LayoutConfig) -> RunConfig {
    RunConfig {
        grid: Grid { replicas: RANKS, expert_group: RANKS, ..Grid::default() },
        model: ModelConfig {
            vocab_size: 64,
            hidden_size: 64,
            num_hidden_layers: LAYERS,
            first_dense: 0,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            head_dim: 32,
            moe_intermediate_size: 64,
            num_experts: 4,
            ..ModelConfig::default()
        },
        train: TrainConfig { sequence_length: 128, micro_batch: 2, ..TrainConfig::default() },
        layout,
        ..RunConfig::default()
    }
}

/// One moment on both clocks.
fn now() -> (Instant, Duration) {
    loop {
        let (instant, wall) = (Instant::now(), SystemTime::now());
        if instant.elapsed() < Duration::from_micros(2) {
            return (instant, wall.duration_since(UNIX_EPOCH).expect("after 1970"));
        }
    }
}

/// A rank's step.
struct Step {
    calls: Vec<FlightEntry>,
    /// Name and middle of every computation, in microseconds since 1970.
    computed: Vec<(&'static str, u64)>,
}

impl Step {
    fn new(calls: Vec<FlightEntry>, spans: &[Span], began: Duration) -> Self {
        assert!(calls.len() < 256 && calls[0].call.seq == 0, "all calls are kept");
        let computed = spans.iter().filter(|span| span.lane == Lane::Compute);
        let middle = |span: &Span| (began + span.start + span.length / 2).as_micros() as u64;
        Self { calls, computed: computed.map(|span| (span.name, middle(span))).collect() }
    }

    fn during<'a>(&'a self, call: &FlightEntry, phase: &'a str) -> impl Iterator<Item = u64> + 'a {
        let (from, to) = (call.started_us, call.ended_us.expect("all calls have ended"));
        let inside = move |at: &u64| from < *at && *at < to;
        self.computed.iter().filter(move |(name, _)| *name == phase).map(|(_, at)| *at).filter(inside)
    }

    /// How many calls of this kind are under way while some `phase` computes.
    fn beside(&self, kind: &str, phase: &str) -> usize {
        let calls = self.calls.iter().filter(|call| call.call.kind == kind);
        calls.filter(|call| self.during(call, phase).next().is_some()).count()
    }

    /// How many of `phase` compute after the first call of this kind has started.
    fn after_first(&self, kind: &str, phase: &str) -> usize {
        let first = self.calls.iter().find(|call| call.call.kind == kind).expect("such a call");
        self.computed.iter().filter(|(name, at)| *name == phase && *at > first.started_us).count()
    }
}

fn steps(layout: LayoutConfig) -> Vec<Step> {
    let config = config(layout);
    config.validate().expect("the test's configs are valid");
    let dataset = Dataset::random(1, 4096, 64).expect("random tokens");
    let fold = Fold::new(config.grid, RANKS).expect("the ranks divide the slots");
    let body = |comm| {
        let deck = FlightDeck::default();
        deck.join(&comm);
        let (instant, began) = now();
        let profile = Profile::new(instant);
        profile.keep_spans(true);
        RankState::new(&config, &dataset, Cpu::new(1), fold, comm, profile.clone())?.step()?;
        let record = deck.records(&Reason::Terminated).remove(0);
        Ok::<_, TrainError>(Step::new(record.calls, &profile.take_spans(), began))
    };
    ThreadRanks::new(RANKS).run(body).expect("the step succeeds")
}

#[test]
fn a_layer_is_gathered_and_another_ones_gradient_reduced_while_one_computes() {
    for step in steps(LayoutConfig { zero: 3, ..LayoutConfig::default() }) {
        // In the forward all but the first two units, in the backward all layers.
        assert!(step.beside("all_gather", "attention") >= 2 * LAYERS - 1);
        assert!(step.beside("all_gather", "head") == 1);
        // The head's and those of all layers but the first.
        assert!(step.beside("reduce_scatter", "attention") == LAYERS);
    }
}

#[test]
fn gradients_are_reduced_as_soon_as_they_are_ready() {
    for (zero, later) in [(1, 0), (2, LAYERS), (3, LAYERS)] {
        for overlap in [true, false] {
            for step in steps(LayoutConfig { zero, overlap, ..LayoutConfig::default() }) {
                let found = step.after_first("reduce_scatter", "expert weights");
                assert_eq!(found, later, "ZeRO-{zero}, overlap {overlap}");
            }
        }
    }
}

#[test]
fn shared_experts_compute_while_rows_travel_and_experts_while_other_chunks_do() {
    for dispatch_chunks in [1, 2, 3] {
        for step in steps(LayoutConfig { dispatch_chunks, ..LayoutConfig::default() }) {
            // Of each layer once in the forward, once in the backward.
            for kind in ["dispatch", "combine"] {
                let beside = |phase| step.beside(kind, phase);
                assert_eq!(beside("shared experts"), 2 * LAYERS, "{kind}, {dispatch_chunks} chunks");
                let others = 2 * LAYERS * (dispatch_chunks - 1);
                assert_eq!(beside("experts"), others, "{kind}, {dispatch_chunks} chunks");
            }
        }
    }
}

#[test]
fn nothing_computes_beside_an_exchange_that_is_waited_for() {
    let layout = LayoutConfig { zero: 3, overlap: false, dispatch_chunks: 2, ..LayoutConfig::default() };
    for step in steps(layout) {
        for kind in ["all_gather", "reduce_scatter", "dispatch", "combine"] {
            assert!(step.calls.iter().any(|call| call.call.kind == kind));
            for phase in ["attention", "shared experts", "experts", "head"] {
                assert_eq!(step.beside(kind, phase), 0, "{kind} beside {phase}");
            }
        }
    }
}
