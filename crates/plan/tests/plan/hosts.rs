//! The engine's step on measured hosts: the list op by op next to the sum of phases, and what the network adds.

use unisono_mesh::{Fold, Grid, LinkClass};
use unisono_plan::dispatch::{Census, DispatchShape};
use unisono_plan::engine::{
    EngineLayout, HostCluster, LocalMachine, Mode, PhaseRates, ProductRates, StepRows, Traffic, TrafficPlan,
    step_work,
};
use unisono_plan::schedule::EngineStep;
use unisono_plan::{KeptActivations, ModelConfig};

const ROWS: StepRows = StepRows { slot: 64, sequence: 32 };

fn layout(ranks: usize, per_host: usize, zero: usize, overlap: bool) -> EngineLayout {
    let grid = Grid { replicas: 4, expert_group: 4, ..Grid::default() };
    let fold = Fold::new(grid, ranks).expect("ranks divide the slots");
    let model = ModelConfig {
        vocab_size: 512,
        hidden_size: 64,
        num_hidden_layers: 3,
        num_experts: 8,
        moe_intermediate_size: 64,
        ..ModelConfig::default()
    };
    EngineLayout {
        model,
        step: EngineStep {
            waves: fold.waves(0).len(),
            turns: 2,
            kept: KeptActivations::All,
            zero,
            overlap,
            every_turn: true,
            reduce_stages: 1,
        },
        node_of: (0..ranks).map(|rank| rank / per_host).collect(),
        fold,
        hierarchical_reduce: false,
        hierarchical_gather: false,
        dispatch: DispatchShape::default(),
    }
}

/// More cores than any layout has ranks, so that nobody waits for one.
fn machine(layout: &EngineLayout) -> LocalMachine {
    let rates = |(communicates, name): (bool, &str)| PhaseRates {
        name: name.into(),
        communicates,
        of_products: 1.0,
        element_s: 1e-9,
        score_s: 1e-10,
        call_s: 1e-6,
    };
    let phase = step_work(layout, ROWS).into_keys().map(rates).collect();
    let table = || vec![10.0; 8];
    LocalMachine {
        cpu: "a processor".into(),
        cores: 16,
        copy_bytes_per_s: 1e10,
        within_80: None,
        products: ProductRates {
            sizes: vec![16, 256],
            plain: table(),
            transposed_right: table(),
            transposed_left: table(),
        },
        mode: vec![Mode { ranks: 1, threads: 1, phase }],
    }
}

fn hosts(hosts: usize, gbyte_per_s: f64, latency_us: f64) -> HostCluster {
    HostCluster::from_toml(&format!(
        "host = \"local\"\nhosts = {hosts}\n[[level]]\nname = \"link\"\ngbyte_per_s = {gbyte_per_s:?}\nlatency_us = {latency_us:?}"
    ))
    .expect("a cluster")
}

fn close(a: f64, b: f64) -> bool {
    (a / b - 1.0).abs() < 1e-6
}

#[test]
fn op_by_op_a_step_takes_what_its_phases_take_together() {
    for (zero, overlap) in [(1, true), (2, true), (3, true), (3, false)] {
        for ranks in [1, 2, 4] {
            let alone = layout(ranks, ranks, zero, overlap);
            let machine = machine(&alone);
            let price = machine.price(&alone, ROWS, 1);
            let simulated = machine.simulate(&alone, ROWS, 1, None).simulated;
            assert!(simulated.seconds < price.step_s && simulated.seconds > 0.9 * price.step_s);
            if ranks > 1 {
                let apart = EngineLayout { node_of: (0..ranks).collect(), ..alone };
                let fast = machine.price_on(&hosts(ranks, 1e9, 1e-9), &apart, ROWS, 1);
                assert!(close(fast.step_s, price.step_s), "{} and {}", fast.step_s, price.step_s);
                let sum: f64 = fast.phases.iter().map(|(_, seconds)| seconds).sum();
                assert!(close(sum, fast.step_s));
            }
        }
    }
}

/// The most bytes that a host sends to others in a step, as the traffic plan counts them call by call.
fn bytes_of_hosts(layout: &EngineLayout) -> Vec<u64> {
    let mut hosts = vec![0; layout.node_of.iter().max().map_or(0, |last| last + 1)];
    for rank in 0..layout.fold.ranks() {
        let mut traffic = Traffic::default();
        let routing: Vec<Vec<Census>> = (0..layout.step.waves * layout.step.turns)
            .map(|pass| {
                let group = &layout.dispatch_groups(rank)[layout.step.wave_of(pass)];
                let census = Census::balanced(group, layout.dispatch.chunks, ROWS.slot, layout.model.top_k);
                vec![census; layout.model.num_hidden_layers - layout.model.first_dense]
            })
            .collect();
        TrafficPlan::new(layout.clone(), rank).step(&routing, true, &mut traffic);
        let far = traffic.rows().into_iter().filter(|row| row.link == LinkClass::OtherNode);
        hosts[layout.node_of[rank]] += far.map(|row| row.bytes_sent).sum::<u64>();
    }
    hosts
}

#[test]
fn a_link_carries_the_bytes_that_the_engine_sends() {
    for (ranks, per_host) in [(2, 1), (4, 2), (4, 1)] {
        for (zero, hierarchical) in [(1, false), (3, false), (2, true)] {
            let mut layout = layout(ranks, per_host, zero, true);
            layout.dispatch.hierarchical = hierarchical;
            layout.hierarchical_reduce = hierarchical;
            layout.hierarchical_gather = hierarchical;
            layout.step.reduce_stages = if hierarchical { 2 } else { 1 };
            let machine = machine(&layout);
            let price = machine.price_on(&hosts(ranks / per_host, 0.01, 1e-9), &layout, ROWS, 1);
            let bytes = bytes_of_hosts(&layout);
            let (most, all) =
                (bytes.iter().max().copied().unwrap_or(0) as f64, bytes.iter().sum::<u64>() as f64);
            // Which host sends most differs from call to call.
            let carried = price.network_s * 0.01e9;
            assert!(
                carried > 0.9999 * most && carried < 1.1 * most && carried < all,
                "{ranks} ranks, {per_host} a host, zero {zero}: {carried} next to {most}"
            );
        }
    }
}

#[test]
fn what_runs_ahead_hides_and_what_does_not_is_waited_for() {
    let price = |overlap, gbyte_per_s, latency_us| {
        let layout = layout(2, 1, 3, overlap);
        machine(&layout).price_on(&hosts(2, gbyte_per_s, latency_us), &layout, ROWS, 1)
    };
    let (ahead, waits) = (price(true, 1.0, 1.0), price(false, 1.0, 1.0));
    assert!(close(ahead.network_s, waits.network_s), "the same travels either way");
    assert!(ahead.waited_s < 0.7 * ahead.network_s, "{} of {}", ahead.waited_s, ahead.network_s);
    assert!(waits.waited_s > ahead.waited_s && waits.step_s > ahead.step_s);
    let (slow, far) = (price(true, 0.1, 1.0), price(true, 1.0, 1000.0));
    assert!(slow.network_s > 5.0 * ahead.network_s && slow.step_s > ahead.step_s);
    // Targets, losses (sums of slots after their number, then loads), the norm (likewise) and times are calls of their own.
    assert!(far.waited_s - ahead.waited_s > 8.0 * 999e-6, "{} after {}", far.waited_s, ahead.waited_s);
}

#[test]
fn ranks_of_a_host_share_its_link_and_racks_theirs() {
    let layout = layout(4, 2, 1, true);
    let rack = "[[level]]\nname = \"rack\"\nwidth = 2\ngbyte_per_s = 10\nlatency_us = 1\n";
    let text = |rack: &str| {
        format!(
            "host = \"local\"\nhosts = 4\n{rack}[[level]]\nname = \"core\"\ngbyte_per_s = 0.01\nlatency_us = 1"
        )
    };
    let network_s = |text: &str, per_host: usize| {
        let apart = EngineLayout { node_of: (0..4).map(|rank| rank / per_host).collect(), ..layout.clone() };
        let cluster = HostCluster::from_toml(text).expect("a cluster");
        machine(&layout).price_on(&cluster, &apart, ROWS, 1).network_s
    };
    let (flat, racks) = (network_s(&text(""), 1), network_s(&text(rack), 1));
    assert!(racks < 0.9 * flat, "two of three exchange partners are beyond the rack: {racks} next to {flat}");
    // Two ranks a host: twice as much goes through each link, two thirds of it to other hosts.
    let shared = network_s(&text(""), 2);
    assert!((1.1..1.6).contains(&(shared / flat)), "{shared} next to {flat}");
}
