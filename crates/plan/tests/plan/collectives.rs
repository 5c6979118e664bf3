//! The tables of collectives against measurements that were left out of them.

use std::collections::BTreeMap;

use unisono_plan::collectives::{Collective, CollectiveModel, Exchange, Group, Way, places_touched};
use unisono_plan::{Cluster, Gpu, PART_SPREADS};

use crate::coverage::holds_four_of_five;

/// Rows of `nccl,gpu,collective,ranks,bytes,us`, `within,gpu,way,multiprocessors,tokens,row bytes,experts,top-k,ranks,us`,
/// `domain,gpu,way,ranks,tokens,row bytes,experts,top-k,us` and `across,gpu,way,servers,multiprocessors,tokens,us`, all of 1 MiB and above.
const HELD_BACK: &str = include_str!("../data/collectives_held_back.csv");

fn model(gpu: &str, gpus: usize) -> CollectiveModel {
    CollectiveModel::of(&Cluster::of(Gpu::named(gpu).unwrap(), gpus).unwrap())
}

fn way(name: &str) -> Way {
    if name == "dispatch" { Way::Dispatch } else { Way::Combine }
}

/// Within a server or domain of `gpus`; `sizes` are tokens, bytes of a row, experts, top-k and ranks.
fn within(gpus: usize, gpu: &str, operation: &str, multiprocessors: usize, sizes: &[usize]) -> f64 {
    let (tokens, row_bytes, experts, top_k, ranks) = (sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]);
    let exchange = Exchange {
        tokens: tokens as f64,
        row_bytes: row_bytes as f64,
        top_k,
        experts,
        group: Group { size: ranks, stride: 1 },
        max_servers: None,
        multiprocessors,
    };
    model(gpu, gpus).exchange_s(way(operation), &exchange)
}

fn predicted_s(kind: &str, gpu: &str, operation: &str, sizes: &[usize]) -> f64 {
    match (kind, sizes) {
        ("nccl", &[ranks, bytes]) => {
            let collective = match operation {
                "all-reduce" => Collective::AllReduce,
                "all-gather" => Collective::AllGather,
                "reduce-scatter" => Collective::ReduceScatter,
                "all-to-all" => Collective::AllToAll,
                other => panic!("{other}"),
            };
            model(gpu, 8).seconds(collective, bytes as f64, Group { size: ranks, stride: 1 })
        }
        ("within", &[multiprocessors, ref of @ ..]) => within(8, gpu, operation, multiprocessors, of),
        ("domain", &[ranks, tokens, row_bytes, experts, top_k]) => {
            within(72, gpu, operation, 20, &[tokens, row_bytes, experts, top_k, ranks])
        }
        ("across", &[servers, multiprocessors, tokens]) => {
            let row_bytes = if operation == "dispatch" { 7168.0 * (1.0 + 4.0 / 128.0) } else { 7168.0 * 2.0 };
            let exchange = Exchange {
                tokens: tokens as f64,
                row_bytes,
                top_k: 8,
                experts: 256,
                group: Group { size: 8 * servers, stride: 1 },
                max_servers: None,
                multiprocessors,
            };
            model(gpu, 8 * servers).exchange_s(way(operation), &exchange)
        }
        _ => panic!("{kind} {sizes:?}"),
    }
}

/// Absolute relative errors by (kind, GPU, operation), ascending.
fn errors() -> BTreeMap<[&'static str; 3], Vec<f64>> {
    let mut errors = ratios();
    for errors in errors.values_mut() {
        errors.iter_mut().for_each(|ratio| *ratio = (*ratio - 1.0).abs());
        errors.sort_by(f64::total_cmp);
    }
    errors
}

#[test]
fn about_four_of_five_sizes_left_out_lie_in_the_interval_of_their_table() {
    for (part, kinds) in [(5, &["nccl"][..]), (7, &["within", "domain", "across"])] {
        let of: Vec<f64> = ratios()
            .into_iter()
            .filter(|(key, _)| kinds.contains(&key[0]))
            .flat_map(|(_, ratios)| ratios)
            .collect();
        holds_four_of_five(&kinds.join(", "), &of, PART_SPREADS[part].table);
    }
}

/// Predicted over measured seconds by (kind, GPU, operation).
fn ratios() -> BTreeMap<[&'static str; 3], Vec<f64>> {
    let mut ratios = BTreeMap::<_, Vec<f64>>::new();
    for line in HELD_BACK.lines().filter(|line| !line.starts_with('#')) {
        let fields: Vec<&str> = line.split(',').collect();
        let sizes: Vec<usize> = fields[3..fields.len() - 1].iter().map(|f| f.parse().unwrap()).collect();
        let measured_us: f64 = fields[fields.len() - 1].parse().unwrap();
        let predicted = predicted_s(fields[0], fields[1], fields[2], &sizes);
        ratios.entry([fields[0], fields[1], fields[2]]).or_default().push(predicted * 1e6 / measured_us);
    }
    ratios
}

#[test]
fn sizes_left_out_are_within_ten_percent_at_the_median_and_mostly_throughout() {
    let errors = errors();
    for (key, errors) in &errors {
        let median = errors[errors.len() / 2];
        println!(
            "{}: {} rows, median {:.1}%, worst {:.1}%",
            key.join(" "),
            errors.len(),
            100.0 * median,
            100.0 * errors[errors.len() - 1]
        );
        assert!(median <= 0.1, "{}: median {median:.3}", key.join(" "));
    }
    // Kind, more rows than which there are, least share of them within 10%; NCCL's changes of protocol between two sizes are
    // what is missed.
    for (kind, rows, least) in
        [("nccl", 80, 0.88), ("within", 80, 0.88), ("domain", 71, 1.0), ("across", 80, 0.98)]
    {
        let of: Vec<f64> =
            errors.iter().filter(|(key, _)| key[0] == kind).flat_map(|(_, e)| e.clone()).collect();
        let share = of.iter().filter(|error| **error <= 0.1).count() as f64 / of.len() as f64;
        println!("{kind}: {} rows, {:.1}% of them within 10%", of.len(), 100.0 * share);
        assert!(of.len() > rows && share >= least, "{kind}: {share:.3} of {} rows within 10%", of.len());
    }
}

/// All-reduces across servers: system, GPU, GPUs that NVLink joins, GB/s of a card, network, ranks, bytes, microseconds.
const ACROSS: &str = include_str!("../data/nccl_across.csv");

/// One of them.
struct AllReduce {
    system: &'static str,
    cluster: String,
    ranks: usize,
    bytes: f64,
    measured_s: f64,
}

impl AllReduce {
    fn all() -> Vec<Self> {
        let rows = ACROSS.lines().filter(|line| !line.starts_with('#'));
        rows.map(|line| {
            let [system, gpu, domain, rate, network, ranks, bytes, us] =
                line.split(',').collect::<Vec<_>>().try_into().unwrap();
            let cluster = format!(
                "gpu = \"{gpu}\"\ngpus = {ranks}\nnvlink_domain = {domain}\nnic_gbyte_per_s = {rate}\nnetwork = \"{network}\""
            );
            let number = |text: &str| text.parse::<f64>().unwrap();
            let measured_s = number(us) * 1e-6;
            Self { system, cluster, ranks: ranks.parse().unwrap(), bytes: number(bytes), measured_s }
        })
        .collect()
    }

    /// Predicted over measured seconds, less 1; with another latency of the network if there is one.
    fn error(&self, latency_us: Option<f64>) -> f64 {
        let mut cluster = Cluster::from_toml(&self.cluster).unwrap();
        if let Some(us) = latency_us {
            cluster.levels[1].latency_s = us * 1e-6;
        }
        let group = Group { size: self.ranks, stride: 1 };
        CollectiveModel::of(&cluster).seconds(Collective::AllReduce, self.bytes, group) / self.measured_s
            - 1.0
    }

    fn mib(&self) -> f64 {
        self.bytes / f64::from(1 << 20)
    }
}

#[test]
fn all_reduces_across_servers_of_sizes_left_out_are_within_ten_percent() {
    let rows = AllReduce::all();
    for row in &rows {
        println!("{}, {} GPUs, {} MiB: {:+.1}%", row.system, row.ranks, row.mib(), 100.0 * row.error(None));
    }
    let (fitted, left_out): (Vec<_>, Vec<_>) = rows
        .iter()
        .filter(|row| row.system.starts_with("B200"))
        .partition(|row| (row.mib().log2() as u32).is_multiple_of(2));
    // The one constant of the network, from every other size alone, by least squares.
    let squares = |us: &u32| fitted.iter().map(|row| row.error(Some(f64::from(*us))).powi(2)).sum::<f64>();
    let latency_us = (1..200).min_by(|a, b| squares(a).total_cmp(&squares(b))).unwrap();
    println!("latency of EFA from {} sizes: {latency_us} us; the others:", fitted.len());
    let efa = Cluster::from_toml(&left_out[0].cluster).unwrap().levels[1].latency_s;
    assert!((efa * 1e6 - f64::from(latency_us)).abs() < 1.5, "{efa} s");
    for row in left_out {
        let error = row.error(None);
        println!("left out: {} MiB, {:+.1}%", row.mib(), 100.0 * error);
        // Of 17.5 to 127.5 MiB the plugin's tuner takes a ring (LL128) where a tree would be faster.
        let tolerance = if row.mib() == 32.0 { 0.15 } else { 0.1 };
        assert!(error.abs() <= tolerance, "{} MiB: {error:+.3}", row.mib());
    }
    for row in rows.iter().filter(|row| ["H200", "DGX ", "200G", "400G"].contains(&&row.system[..4])) {
        assert!(row.error(None).abs() <= 0.1, "{}, {} GPUs: {:+.3}", row.system, row.ranks, row.error(None));
    }
}

/// Published rates of dispatch and combine: library, system, fabric, ranks, multiprocessors, what is measured, operation,
/// tokens, width, experts of a token, GB/s.
const PUBLISHED: &str = include_str!("../data/deepep_published.csv");

/// A row of them: what it belongs to, its ranks and multiprocessors, and GB/s predicted over published, less 1.
struct Rate {
    of: [&'static str; 4],
    operation: &'static str,
    ranks: usize,
    multiprocessors: Option<usize>,
    error: f64,
}

impl Rate {
    fn of(line: &'static str) -> Self {
        let [
            library,
            system,
            fabric,
            ranks,
            multiprocessors,
            measured,
            operation,
            tokens,
            hidden,
            top_k,
            gb_per_s,
        ] = line.split(',').collect::<Vec<_>>().try_into().unwrap();
        let number = |text: &str| text.parse::<f64>().unwrap();
        // Generations are named by their first.
        let gpu = match system {
            "SM90" => "H100",
            "SM100" => "B200",
            other => other,
        };
        let ranks: usize = ranks.split('x').map(|part| part.parse::<usize>().unwrap()).product();
        let multiprocessors = multiprocessors.parse().ok();
        let of_deepseek = library.starts_with("DeepEP V");
        let exchange = Exchange {
            tokens: number(tokens),
            row_bytes: number(hidden) * if operation == "dispatch_fp8" { 1.0 + 4.0 / 128.0 } else { 2.0 },
            top_k: top_k.parse().unwrap(),
            experts: if of_deepseek { 256 } else { 8 * ranks },
            group: Group { size: ranks, stride: 1 },
            max_servers: of_deepseek.then_some(4),
            multiprocessors: multiprocessors.unwrap_or(20),
        };
        let cluster = Cluster::of(Gpu::named(gpu).unwrap(), ranks).unwrap();
        let servers = ranks / cluster.nvlink_domain();
        // Copies that count: one for each server where the network is the bottleneck, else one for each rank, its own included;
        // kernels of low latency merge none.
        let visited = servers.min(exchange.max_servers.unwrap_or(servers));
        let copies = match servers {
            _ if library.ends_with("low-latency") => exchange.top_k as f64,
            1 => places_touched(exchange.experts, exchange.top_k, ranks),
            _ => places_touched(exchange.experts * visited / servers, exchange.top_k, visited),
        };
        let way = if operation.starts_with("dispatch") { Way::Dispatch } else { Way::Combine };
        let seconds = CollectiveModel::of(&cluster).exchange_s(way, &exchange);
        let found = exchange.tokens * exchange.row_bytes * copies / seconds / 1e9;
        let error = found / number(gb_per_s) - 1.0;
        Self { of: [library, system, fabric, measured], operation, ranks, multiprocessors, error }
    }

    /// Whether the planner's tables are of these very kernels: DeepEP's own first ones, on as many multiprocessors as were measured.
    fn is_priced(&self) -> bool {
        match self.of[..2] {
            ["DeepEP V1 normal", _] => true,
            ["DeepEP", "B200"] => self.multiprocessors.is_some_and(|count| count <= 24),
            _ => false,
        }
    }
}

/// None of them is in the tables.
#[test]
fn published_exchanges_are_within_ten_percent() {
    let rates: Vec<Rate> = PUBLISHED.lines().filter(|line| !line.starts_with('#')).map(Rate::of).collect();
    assert_eq!(rates.len(), 201);
    let mut others = BTreeMap::<_, Vec<f64>>::new();
    for rate in &rates {
        let error = rate.error;
        if !rate.is_priced() {
            others.entry(rate.of).or_default().push(error.abs());
            continue;
        }
        let name = format!("{}, {}, {} GPUs", rate.of[..3].join(", "), rate.operation, rate.ranks);
        println!("{name}: {:+.1}%", 100.0 * error);
        // Two servers of H800 reach 43 GB/s where those of the table, H100's, reach more; and what NVLink of H800 takes in combine
        // is H100's time scaled.
        let tolerance = match (rate.of[1], rate.ranks, rate.operation) {
            ("H800", 16, _) => 0.31,
            ("H800", 8, "combine_bf16") => 0.15,
            _ => 0.1,
        };
        assert!(error.abs() <= tolerance, "{name}: {error:+.3}");
    }
    // Other libraries, and more multiprocessors than the tables have: what a plan would be off by.
    for (of, mut errors) in others {
        errors.sort_by(f64::total_cmp);
        let within = errors.iter().filter(|error| **error <= 0.1).count();
        let median = 100.0 * errors[errors.len() / 2];
        println!(
            "not in the tables: {}: {within} of {} within 10%, median {median:.0}%",
            of.join(", "),
            errors.len()
        );
    }
}
