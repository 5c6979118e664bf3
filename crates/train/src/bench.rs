//! Measurements of whole steps: how fast, how large, and how near the rate of the step's own products.

use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use unisono_comm::{Communicator, ThreadRanks};
use unisono_data::Dataset;
use unisono_mesh::Fold;
use unisono_model::Profile;
use unisono_plan::ModelConfig;
use unisono_tensor::cpu::Crew;
use unisono_tensor::{Backend, Buffer, Cpu, Dims, Product};

use crate::config::RunConfig;
use crate::crew::lending;
use crate::error::TrainError;
use crate::rank::RankState;
use crate::run::root_cause;
use crate::system::peak_rss;

/// What is measured.
#[derive(Debug, Clone)]
pub struct StepBench {
    /// The computation.
    pub config: RunConfig,
    /// Ranks.
    pub ranks: usize,
    /// Compute threads of each rank.
    pub threads: usize,
    /// Steps before the measured ones.
    pub warmup: usize,
    /// Steps measured.
    pub steps: usize,
}

/// Least, median and largest of a measured time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Seconds {
    /// The middle one.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepMeasured {
    /// Tokens a second at the median step.
    pub tokens_per_s: f64,
    /// Seconds of a step.
    pub step_s: Seconds,
    /// Peak resident memory of the process.
    pub peak_rss_mib: f64,
    /// Buffers of the largest rank.
    pub rank_mib: f64,
    /// The last step's loss.
    pub loss: f64,
    /// Model floating-point operations a second, in 10^9, at the median step.
    pub gflops: f64,
    /// `(lane, phase, milliseconds a step)` of the mean rank.
    pub phases: Vec<(String, String, f64)>,
}

/// Runs steps on tokens without meaning and times them; nothing is written.
///
/// # Errors
/// If the config cannot be run.
pub fn bench_step(bench: &StepBench) -> Result<StepMeasured, TrainError> {
    let config = &bench.config;
    config.validate()?;
    let fold = Fold::new(config.grid, bench.ranks)?;
    let tokens = config.tokens_per_step() * 4 + 1;
    let dataset = Arc::new(Dataset::random(1, tokens, config.model.vocab_size.min(4096) as u32)?);
    let (ranks, crew) = lending(ThreadRanks::new(bench.ranks), bench.ranks);
    let body = |comm: Communicator| run_steps(bench, fold, &dataset, &crew, comm);
    let ranks = ranks.run(body).map_err(root_cause)?;
    let mut times = ranks[0].0.clone();
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    let tokens = config.tokens_per_step() as f64;
    let flops = config.model.train_flops(config.train.sequence_length);
    Ok(StepMeasured {
        tokens_per_s: tokens / median,
        step_s: Seconds { median, min: times[0], max: times[times.len() - 1] },
        peak_rss_mib: peak_rss().unwrap_or(0) as f64 / f64::from(1 << 20),
        rank_mib: ranks.iter().map(|rank| rank.2).max().unwrap_or(0) as f64 / f64::from(1 << 20),
        loss: ranks[0].1,
        gflops: flops * tokens / median / 1e9,
        phases: ranks[0].3.clone(),
    })
}

type RankTimes = (Vec<f64>, f64, usize, Vec<(String, String, f64)>);

fn run_steps(
    bench: &StepBench,
    fold: Fold,
    dataset: &Dataset,
    crew: &Crew,
    comm: Communicator,
) -> Result<RankTimes, TrainError> {
    let backend = Cpu::in_crew(bench.threads, crew, comm.rank());
    let profile = Profile::new(Instant::now());
    let mut state = RankState::new(&bench.config, dataset, backend.clone(), fold, comm, profile.clone())?;
    let mut loss = 0.0;
    for _ in 0..bench.warmup {
        loss = state.step()?.loss;
    }
    let before = profile.phases();
    let mut times = Vec::new();
    for _ in 0..bench.steps {
        let record = state.step()?;
        (loss, _) = (record.loss, times.push(record.step_s));
    }
    let spent = |lane, name: &str| {
        before.iter().find(|p| (p.0, p.1) == (lane, name)).map_or(0.0, |p| p.2.as_secs_f64())
    };
    let phases = profile.phases().into_iter().map(|(lane, name, time)| {
        let seconds = time.as_secs_f64() - spent(lane, name);
        (lane.name().to_string(), name.to_string(), seconds * 1e3 / bench.steps as f64)
    });
    Ok((times, loss, backend.memory().1, phases.collect()))
}

/// One product shape of a step: how often it runs, for how many rows at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProductShape {
    /// Which product.
    pub product: Product,
    /// Its sizes.
    pub dims: Dims,
    /// How often a step runs it.
    pub count: usize,
}

impl ProductShape {
    /// Floating-point operations of all of them.
    pub fn flops(&self) -> f64 {
        2.0 * self.dims.m as f64 * self.dims.n as f64 * self.dims.k as f64 * self.count as f64
    }
}

/// The products of one step with weights: forward, gradient of the input, gradient of the weight; `rows` at a time, balanced
/// routing, the head in tiles of 256 rows.
pub fn product_shapes(model: &ModelConfig, rows: usize, turns: usize) -> Vec<ProductShape> {
    let d = model.hidden_size;
    let mut shapes: Vec<ProductShape> = Vec::new();
    let mut add = |rows: usize, inputs: usize, outputs: usize, count: usize| {
        for (product, dims) in [
            (Product::Plain, Dims { m: rows, n: outputs, k: inputs }),
            (Product::TransposedRight, Dims { m: rows, n: inputs, k: outputs }),
            (Product::TransposedLeft, Dims { m: inputs, n: outputs, k: rows }),
        ] {
            match shapes.iter_mut().find(|s| (s.product, s.dims) == (product, dims)) {
                Some(shape) => shape.count += count * turns,
                None => shapes.push(ProductShape { product, dims, count: count * turns }),
            }
        }
    };
    for layer in 0..model.num_hidden_layers {
        add(rows, d, model.qkv_width(), 1);
        add(rows, model.num_attention_heads * model.head_dim, d, 1);
        let mut ffn = |rows: usize, width: usize, count: usize| {
            add(rows, d, 2 * width, count);
            add(rows, width, d, count);
        };
        if model.is_moe(layer) {
            // Fewer rows than experts go to some of them, one to each.
            let (rows, experts) = (rows * model.top_k, model.num_experts);
            ffn((rows / experts).max(1), model.moe_intermediate_size, experts.min(rows));
            if model.num_shared_experts > 0 {
                ffn(rows, model.shared_width(), 1);
            }
            add(rows, d, model.num_experts, 1);
        } else {
            ffn(rows, model.intermediate_size, 1);
        }
    }
    let tile = rows.min(256);
    add(tile, d, model.vocab_size, rows / tile);
    shapes
}

/// What the products of a step reach alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProductsMeasured {
    /// Rate over all shapes, weighted by their operations, in 10^9 a second, all threads: at the median time of each, which
    /// compares with a median step.
    pub gflops: f64,
    /// The same at the least time of each, which compares with the fastest step.
    pub gflops_at_best: f64,
    /// `(shape, share of operations, rate at the median)` of each.
    pub shapes: Vec<(String, f64, f64)>,
}

/// The products of a step, each timed alone, `threads` copies of it side by side on data of their own.
#[derive(Debug)]
pub struct ProductBench {
    shapes: Vec<ProductShape>,
    threads: usize,
    /// Seconds of one product, by shape: of the slowest thread each.
    times: Vec<Vec<f64>>,
}

impl ProductBench {
    /// Times each product of `rows` at a time.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn start(model: &ModelConfig, rows: usize, threads: usize) -> Result<Self, TrainError> {
        let shapes = product_shapes(model, rows, 1);
        let times = vec![Vec::new(); shapes.len()];
        let mut bench = Self { shapes, threads, times };
        bench.measure()?;
        Ok(bench)
    }

    /// Times each product as often again: before and after what it is compared with, so that a machine whose speed drifts shows
    /// both.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn measure(&mut self) -> Result<(), TrainError> {
        for (shape, times) in self.shapes.iter().zip(&mut self.times) {
            let of_threads =
                ThreadRanks::new(self.threads).run(|comm| time_product(shape, &comm)).map_err(root_cause)?;
            times.extend((0..PRODUCT_TIMES).map(|i| of_threads.iter().map(|t| t[i]).fold(0.0, f64::max)));
        }
        Ok(())
    }

    /// The rates over all that was timed.
    pub fn result(mut self) -> ProductsMeasured {
        self.times.iter_mut().for_each(|times| times.sort_by(f64::total_cmp));
        let seconds = |at: &dyn Fn(&[f64]) -> f64| -> f64 {
            let of_shape = |(shape, times): (&ProductShape, &Vec<f64>)| shape.count as f64 * at(times);
            self.shapes.iter().zip(&self.times).map(of_shape).sum::<f64>() / self.threads as f64
        };
        let median = |times: &[f64]| times[times.len() / 2];
        let total: f64 = self.shapes.iter().map(ProductShape::flops).sum();
        let shapes = self.shapes.iter().zip(&self.times).map(|(shape, times)| {
            let Dims { m, n, k } = shape.dims;
            let rate = shape.flops() / shape.count as f64 * self.threads as f64 / median(times);
            (format!("{:?} {m} x {n} x {k}", shape.product), shape.flops() / total, rate / 1e9)
        });
        ProductsMeasured {
            gflops: total / seconds(&median) / 1e9,
            gflops_at_best: total / seconds(&|times| times[0]) / 1e9,
            shapes: shapes.collect(),
        }
    }
}

/// How often a product is timed at once, after a call that warms up.
const PRODUCT_TIMES: usize = 6;

/// Seconds of one product, [`PRODUCT_TIMES`] times, begun together with the other ranks of `comm`.
pub(crate) fn time_product(
    shape: &ProductShape,
    comm: &Communicator,
) -> Result<[f64; PRODUCT_TIMES], TrainError> {
    let backend = Cpu::new(1);
    let Dims { m, n, k } = shape.dims;
    let filled = |len: usize| {
        let mut buffer = backend.alloc(len);
        backend.fill(buffer.all_mut(), 0.5);
        buffer
    };
    let (a, b, mut c) = (filled(m * k), filled(k * n), filled(m * n));
    let mut multiply = || backend.matmul(shape.product, shape.dims, a.all(), b.all(), c.all_mut(), false);
    let repeats = (2e7 / (m as f64 * n as f64 * k as f64)).ceil().max(1.0) as usize;
    multiply();
    let mut times = [0.0; PRODUCT_TIMES];
    for time in &mut times {
        comm.barrier()?;
        let begin = Instant::now();
        (0..repeats).for_each(|_| multiply());
        *time = begin.elapsed().as_secs_f64() / repeats as f64;
    }
    Ok(times)
}
