//! The router: scores, choice of experts, weights, the losses that keep experts in balance, and their gradient.
//!
//! Formulas: DeepSeek-V3 (2024), sections 2.1.2 (scores, bias, weights, sequence-wise balance loss); the z-loss is that
//! of ST-MoE (Zoph et al., 2022). With scores s over a row's experts, p = s / sum(s) and, over a sequence of T tokens,
//! f_e = experts / (top_k * T) * count_e, the balance loss is the sum over experts of f_e * mean(p_e).

use std::ops::Range;

use super::parallel::{DisjointMut, Scratch, Threads};
use super::simd::{self, vectorized};
use crate::backend::{RouterShape, Routing};

/// Rows of a task.
const ROWS: usize = 32;

/// Added to sums of scores before dividing by them: without effect on all but sums of scores that underflow.
const TINY: f32 = 1e-20;

/// Experts whose mean scores are summed in one pass over a sequence.
const EXPERTS: usize = 16;

pub(super) fn router(threads: &Threads, shape: RouterShape, logits: &[f32], bias: &[f32]) -> Routing {
    check(shape, logits);
    assert_eq!(bias.len(), shape.experts, "router: one bias an expert");
    let rows = logits.len() / shape.experts;
    let sequences = rows / shape.sequence;
    let mut routing = Routing {
        experts: vec![0; rows * shape.top_k],
        weights: vec![0.0; rows * shape.top_k],
        counts: vec![0; sequences * shape.experts],
        balance_loss: vec![0.0; sequences],
        z_loss: vec![0.0; sequences],
        entropy: vec![0.0; sequences],
    };
    let mut shares = Scratch::take(logits.len());
    let mut log_sums = Scratch::take(rows);
    let mut entropies = Scratch::take(rows);
    {
        let outputs = [&mut *shares, &mut *log_sums, &mut *entropies].map(DisjointMut::new);
        let experts = DisjointMut::new(&mut routing.experts);
        let weights = DisjointMut::new(&mut routing.weights);
        threads.run_rows(rows, ROWS, |rows| {
            let pairs = rows.start * shape.top_k..rows.end * shape.top_k;
            let elements = rows.start * shape.experts..rows.end * shape.experts;
            let [shares, log_sums, entropies] = &outputs;
            // SAFETY: every task has rows of its own.
            let tile = unsafe {
                Tile {
                    experts: experts.range(pairs.clone()),
                    weights: weights.range(pairs),
                    shares: shares.range(elements.clone()),
                    log_sums: log_sums.range(rows.clone()),
                    entropies: entropies.range(rows.clone()),
                }
            };
            route_rows(shape, rows, &logits[elements], bias, tile);
        });
    }
    sum_sequences(threads, shape, &shares, &log_sums, &entropies, &mut routing);
    routing
}

/// The shape is one that a checked config allows.
fn check(shape: RouterShape, logits: &[f32]) {
    let RouterShape { experts, top_k, groups, top_groups, sequence, .. } = shape;
    assert!(
        (1..=experts).contains(&top_k)
            && (1..=groups).contains(&top_groups)
            && experts.is_multiple_of(groups)
            && experts / groups * top_groups >= top_k,
        "router: cannot choose {top_k} of {experts} experts from {top_groups} of {groups} groups"
    );
    assert!(
        sequence > 0 && logits.len().is_multiple_of(sequence * experts),
        "router: {} logits are no whole sequences of {sequence} tokens and {experts} experts",
        logits.len()
    );
}

/// What the rows of a task write.
struct Tile<'a> {
    experts: &'a mut [u32],
    weights: &'a mut [f32],
    shares: &'a mut [f32],
    log_sums: &'a mut [f32],
    entropies: &'a mut [f32],
}

fn route_rows(shape: RouterShape, rows: Range<usize>, logits: &[f32], bias: &[f32], tile: Tile<'_>) {
    let mut scores = Scratch::take(shape.experts);
    let mut keys = Scratch::take(shape.experts + shape.groups);
    let mut groups = Scratch::take(shape.top_groups);
    let groups: &mut [u32] = bytemuck::cast_slice_mut(&mut groups);
    for (i, row) in rows.enumerate() {
        let logits = &logits[i * shape.experts..(i + 1) * shape.experts];
        let shares = &mut tile.shares[i * shape.experts..(i + 1) * shape.experts];
        let chosen = &mut tile.experts[i * shape.top_k..(i + 1) * shape.top_k];
        (tile.log_sums[i], tile.entropies[i]) = vectorized(
            #[inline(always)]
            || {
                let log_sum = log_sum_exp(logits);
                score(shape, logits, log_sum, &mut scores);
                for ((key, s), b) in keys.iter_mut().zip(scores.iter()).zip(bias) {
                    let key_or_nan = s + b;
                    *key = if key_or_nan.is_nan() { f32::NEG_INFINITY } else { key_or_nan };
                }
                let sum = share(&scores, shares);
                (log_sum, entropy(shape, logits, log_sum, sum, shares))
            },
        );
        if shape.force_balance {
            let first = row % shape.sequence * shape.top_k;
            chosen.iter_mut().enumerate().for_each(|(c, e)| *e = ((first + c) % shape.experts) as u32);
        } else {
            choose(shape, &mut keys, groups, chosen);
        }
        chosen.sort_unstable();
        weigh(shape, &scores, chosen, &mut tile.weights[i * shape.top_k..(i + 1) * shape.top_k]);
    }
}

/// `ln(sum(e^logit))`.
#[inline(always)]
fn log_sum_exp(logits: &[f32]) -> f32 {
    let max = simd::max(logits);
    max + libm::logf(simd::sum(logits, |l| simd::exp(l - max)))
}

/// Sigmoid or softmax of the logits.
#[inline(always)]
fn score(shape: RouterShape, logits: &[f32], log_sum: f32, scores: &mut [f32]) {
    for (s, &l) in scores.iter_mut().zip(logits) {
        *s = if shape.sigmoid { simd::sigmoid(l) } else { simd::exp(l - log_sum) };
    }
}

/// `shares = scores / sum(scores)`; returns the divisor.
#[inline(always)]
fn share(scores: &[f32], shares: &mut [f32]) -> f32 {
    let sum = simd::sum(scores, |s| s) + TINY;
    for (p, s) in shares.iter_mut().zip(scores) {
        *p = s / sum;
    }
    sum
}

/// `-sum(p ln p)`, from the logarithms of the scores: `p ln p = p (ln s - ln sum)`.
#[inline(always)]
fn entropy(shape: RouterShape, logits: &[f32], log_sum: f32, sum: f32, shares: &[f32]) -> f32 {
    let log_divisor = libm::logf(sum);
    simd::sum2(shares, logits, |p, l| {
        let log_score = if shape.sigmoid { l.min(0.0) - ln_1p(simd::exp(-l.abs())) } else { l - log_sum };
        p * (log_divisor - log_score)
    })
}

/// `ln(1 + u)` for u in 0..=1: `2 atanh(t)` with `t = u / (2 + u)`, by its Taylor series to t^11 (error under 1e-7).
#[inline(always)]
fn ln_1p(u: f32) -> f32 {
    let t = u / (2.0 + u);
    let t2 = t * t;
    let mut series = 1.0 / 11.0;
    for coefficient in [1.0 / 9.0, 1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0, 1.0] {
        series = series * t2 + coefficient;
    }
    2.0 * t * series
}

/// Chooses experts by `keys` (the experts' keys, then room for the groups'), within the best groups.
fn choose(shape: RouterShape, keys: &mut [f32], groups: &mut [u32], chosen: &mut [u32]) {
    let (keys, group_keys) = keys.split_at_mut(shape.experts);
    if shape.groups == 1 {
        return select(keys, 0..shape.experts, chosen);
    }
    let size = shape.experts / shape.groups;
    for (group, members) in group_keys.iter_mut().zip(keys.chunks_exact(size)) {
        let mut best = [f32::NEG_INFINITY; 2];
        for &key in members {
            best = if key > best[0] { [key, best[0]] } else { [best[0], best[1].max(key)] };
        }
        *group = if size > 1 { best[0] + best[1] } else { best[0] };
        // Infinities of both signs: the group is not a number, and comes last.
        *group = if group.is_nan() { f32::NEG_INFINITY } else { *group };
    }
    select(group_keys, 0..shape.groups, groups);
    groups.sort_unstable();
    let members = groups.iter().flat_map(|&group| group as usize * size..(group as usize + 1) * size);
    select(keys, members, chosen);
}

/// Fills `chosen` with the candidates of the largest keys; of equal keys the earlier candidate. There are at least as
/// many candidates as places, and no key is NaN.
fn select(keys: &[f32], candidates: impl Iterator<Item = usize>, chosen: &mut [u32]) {
    let mut count = 0;
    for candidate in candidates {
        let key = keys[candidate];
        let worse = |other: u32| key > keys[other as usize];
        if count < chosen.len() {
            count += 1;
        } else if !worse(chosen[count - 1]) {
            continue;
        }
        let mut place = count - 1;
        while place > 0 && worse(chosen[place - 1]) {
            chosen[place] = chosen[place - 1];
            place -= 1;
        }
        chosen[place] = candidate as u32;
    }
}

/// Weights of the chosen experts from their scores.
fn weigh(shape: RouterShape, scores: &[f32], chosen: &[u32], weights: &mut [f32]) {
    let divisor = chosen_sum(shape, scores, chosen);
    for (w, &e) in weights.iter_mut().zip(chosen) {
        *w = shape.scaling * (scores[e as usize] / divisor);
    }
}

/// What the chosen scores are divided by; experts ascending.
fn chosen_sum(shape: RouterShape, scores: &[f32], chosen: &[u32]) -> f32 {
    if !shape.normalize {
        return 1.0;
    }
    chosen.iter().fold(0.0, |sum, &e| sum + scores[e as usize]) + TINY
}

/// Counts and losses of every sequence, tokens ascending.
fn sum_sequences(
    threads: &Threads,
    shape: RouterShape,
    shares: &[f32],
    log_sums: &[f32],
    entropies: &[f32],
    routing: &mut Routing,
) {
    let Routing { experts, counts, balance_loss, z_loss, entropy, .. } = routing;
    let [balance_loss, z_loss, entropy] = [balance_loss, z_loss, entropy].map(|v| DisjointMut::new(v));
    threads.chunks_mut(counts, shape.experts, |i, counts| {
        // SAFETY: every task has a sequence of its own.
        let [balance_loss, z_loss, entropy] =
            [balance_loss, z_loss, entropy].map(|v| unsafe { &mut v.range(i..i + 1)[0] });
        let tokens = i * shape.sequence..(i + 1) * shape.sequence;
        for &e in &experts[tokens.start * shape.top_k..tokens.end * shape.top_k] {
            counts[e as usize] += 1;
        }
        let shares = &shares[tokens.start * shape.experts..tokens.end * shape.experts];
        *balance_loss = vectorized(
            #[inline(always)]
            || balance_of(shape, shares, counts),
        );
        *z_loss = log_sums[tokens.clone()].iter().map(|&l| f64::from(l) * f64::from(l)).sum();
        *entropy = entropies[tokens].iter().map(|&h| f64::from(h)).sum();
    });
}

/// `sum over experts of f_e * mean(p_e)` of one sequence.
#[inline(always)]
fn balance_of(shape: RouterShape, shares: &[f32], counts: &[u32]) -> f64 {
    let mut total = 0.0;
    for first in (0..shape.experts).step_by(EXPERTS) {
        let experts = first..shape.experts.min(first + EXPERTS);
        let mut sums = [0f64; EXPERTS];
        for row in shares.chunks_exact(shape.experts) {
            sums.iter_mut().zip(&row[experts.clone()]).for_each(|(sum, &p)| *sum += f64::from(p));
        }
        for (sum, &count) in sums.iter().zip(&counts[experts]) {
            total += load(shape, count) * (sum / shape.sequence as f64);
        }
    }
    total
}

/// `f_e`: 1 for an expert with its fair share of the choices.
#[inline(always)]
fn load(shape: RouterShape, count: u32) -> f64 {
    shape.experts as f64 / (shape.top_k * shape.sequence) as f64 * f64::from(count)
}

pub(super) fn router_backward(
    threads: &Threads,
    shape: RouterShape,
    logits: &[f32],
    routing: &Routing,
    dweights: &[f32],
    balance: f32,
    z: f32,
    dlogits: &mut [f32],
) {
    check(shape, logits);
    let rows = logits.len() / shape.experts;
    assert_eq!(dlogits.len(), logits.len(), "router_backward: dlogits is shaped like logits");
    assert_eq!(
        [dweights.len(), routing.experts.len()],
        [rows * shape.top_k; 2],
        "router_backward: {rows} rows"
    );
    assert_eq!(routing.counts.len(), rows / shape.sequence * shape.experts, "router_backward: counts");
    threads.chunks_mut(dlogits, ROWS * shape.experts, |task, dlogits| {
        let mut scratch = Scratch::take(4 * shape.experts);
        for (i, dlogits) in dlogits.chunks_exact_mut(shape.experts).enumerate() {
            let row = task * ROWS + i;
            let pairs = row * shape.top_k..(row + 1) * shape.top_k;
            let counts = row / shape.sequence * shape.experts;
            let row = Row {
                logits: &logits[row * shape.experts..(row + 1) * shape.experts],
                chosen: &routing.experts[pairs.clone()],
                dweights: &dweights[pairs],
                counts: &routing.counts[counts..counts + shape.experts],
            };
            vectorized(
                #[inline(always)]
                || row_backward(shape, row, balance, z, &mut scratch, dlogits),
            );
        }
    });
}

/// What the gradient of a row's logits needs.
#[derive(Clone, Copy)]
struct Row<'a> {
    logits: &'a [f32],
    chosen: &'a [u32],
    dweights: &'a [f32],
    counts: &'a [u32],
}

#[inline(always)]
fn row_backward(
    shape: RouterShape,
    row: Row<'_>,
    balance: f32,
    z: f32,
    scratch: &mut [f32],
    dlogits: &mut [f32],
) {
    let (scores, rest) = scratch.split_at_mut(shape.experts);
    let (dscores, rest) = rest.split_at_mut(shape.experts);
    let log_sum = if shape.sigmoid && z == 0.0 { 0.0 } else { log_sum_exp(row.logits) };
    score(shape, row.logits, log_sum, scores);
    dscores.fill(0.0);
    if balance != 0.0 {
        balance_backward(shape, row.counts, balance, scores, rest, dscores);
    }
    weights_backward(shape, row, scores, dscores);
    if shape.sigmoid {
        for ((dl, ds), s) in dlogits.iter_mut().zip(&*dscores).zip(&*scores) {
            *dl = ds * s * (1.0 - s);
        }
    } else {
        let mean = simd::dot(dscores, scores);
        for ((dl, ds), s) in dlogits.iter_mut().zip(&*dscores).zip(&*scores) {
            *dl = s * (ds - mean);
        }
    }
    if z != 0.0 {
        let slope = 2.0 * z * log_sum;
        for (dl, &l) in dlogits.iter_mut().zip(row.logits) {
            *dl += slope * simd::exp(l - log_sum);
        }
    }
}

/// `dscores += balance / T * (f_e - sum(f p)) / sum(s)`; `scratch` holds two values an expert.
#[inline(always)]
fn balance_backward(
    shape: RouterShape,
    counts: &[u32],
    balance: f32,
    scores: &[f32],
    scratch: &mut [f32],
    dscores: &mut [f32],
) {
    let (shares, loads) = scratch.split_at_mut(shape.experts);
    let sum = share(scores, shares);
    loads.iter_mut().zip(counts).for_each(|(f, &count)| *f = load(shape, count) as f32);
    let mean = simd::dot(loads, shares);
    let factor = balance / shape.sequence as f32;
    for (ds, f) in dscores.iter_mut().zip(&*loads) {
        *ds += factor * ((f - mean) / sum);
    }
}

/// Adds the gradient of the chosen weights to `dscores`.
#[inline(always)]
fn weights_backward(shape: RouterShape, row: Row<'_>, scores: &[f32], dscores: &mut [f32]) {
    let divisor = chosen_sum(shape, scores, row.chosen);
    let mut mean = 0.0;
    if shape.normalize {
        for (dw, &e) in row.dweights.iter().zip(row.chosen) {
            mean += dw * (scores[e as usize] / divisor);
        }
    }
    for (dw, &e) in row.dweights.iter().zip(row.chosen) {
        dscores[e as usize] += shape.scaling * ((dw - mean) / divisor);
    }
}
