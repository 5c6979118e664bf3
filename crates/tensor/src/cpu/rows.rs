//! Kernels that move whole rows: lookup, scatter, gather and combine.

use super::bf16;
use super::parallel::{DisjointMut, Threads};
use super::simd::vectorized;
use crate::backend::{NO_ROW, Wire};

/// Elements of a task.
const TASK: usize = 16 * 1024;

/// Columns that a scatter task owns, and that a combine keeps in registers.
const COLUMNS: usize = 64;

/// Rows of `d` elements in a task.
fn rows_per_task(d: usize) -> usize {
    (TASK / d.max(1)).max(1)
}

/// Row `index` of `src`, rows of `d`.
#[inline(always)]
fn row_of(src: &[f32], d: usize, index: u32) -> &[f32] {
    let start = index as usize * d;
    match src.get(start..start + d) {
        Some(row) => row,
        None => panic!("row {index} of a table of {} rows", src.len() / d),
    }
}

pub(super) fn embedding(threads: &Threads, ids: &[u32], table: &[f32], d: usize, out: &mut [f32]) {
    assert!(!ids.contains(&NO_ROW), "embedding: row {NO_ROW} of a table of {} rows", table.len() / d.max(1));
    gather_rows(threads, table, d, ids, out);
}

pub(super) fn embedding_backward(threads: &Threads, ids: &[u32], dout: &[f32], d: usize, dtable: &mut [f32]) {
    assert_eq!(dout.len(), ids.len() * d, "embedding_backward: {} ids, rows of {d}", ids.len());
    let vocab = dtable.len() / d.max(1);
    let dtable = DisjointMut::new(dtable);
    threads.run(d.div_ceil(COLUMNS), |task| {
        let columns = task * COLUMNS..d.min((task + 1) * COLUMNS);
        for (&id, row) in ids.iter().zip(dout.chunks_exact(d)) {
            assert!((id as usize) < vocab, "row {id} of a table of {vocab} rows");
            let start = id as usize * d;
            // SAFETY: tasks own disjoint columns, and this task holds one part at a time.
            let dst = unsafe { dtable.range(start + columns.start..start + columns.end) };
            let src = &row[columns.clone()];
            dst.iter_mut().zip(src).for_each(|(d, s)| *d += s);
        }
    });
}

pub(super) fn gather_rows(threads: &Threads, src: &[f32], d: usize, index: &[u32], dst: &mut [f32]) {
    assert_eq!(dst.len(), index.len() * d, "gather_rows: {} rows of {d}", index.len());
    let rows = rows_per_task(d);
    threads.chunks_mut(dst, rows * d, |task, dst| {
        let filled =
            dst.chunks_exact_mut(d).zip(&index[task * rows..]).filter(|(_, index)| **index != NO_ROW);
        for (dst, &index) in filled {
            dst.copy_from_slice(row_of(src, d, index));
        }
    });
}

/// One row's choices: experts, and where their outputs stand.
#[derive(Clone, Copy)]
pub(super) struct Choices<'a> {
    pub experts: &'a [u32],
    pub index: &'a [u32],
    pub node_size: usize,
}

pub(super) fn combine_rows(
    threads: &Threads,
    src: &[f32],
    d: usize,
    choices: Choices<'_>,
    top_k: usize,
    wire: Wire,
    shared: Option<&[f32]>,
    base: Option<&[f32]>,
    out: &mut [f32],
) {
    let Choices { experts, index, node_size } = choices;
    assert!(top_k > 0 && node_size > 0, "combine_rows: top_k {top_k}, node_size {node_size}");
    let pairs = out.len() / d.max(1) * top_k;
    assert_eq!([experts.len(), index.len()], [pairs; 2], "combine_rows: rows of {top_k} choices");
    for (name, addend) in [("shared", shared), ("base", base)] {
        assert!(addend.is_none_or(|a| a.len() == out.len()), "combine_rows: {name} is not shaped like out");
    }
    let rows = rows_per_task(d * top_k);
    threads.chunks_mut(out, rows * d, |task, out| {
        for (i, out) in out.chunks_exact_mut(d).enumerate() {
            let row = task * rows + i;
            let pairs = row * top_k..(row + 1) * top_k;
            let choices = Choices { experts: &experts[pairs.clone()], index: &index[pairs], node_size };
            let [shared, base] = [shared, base].map(|addend| addend.map(|a| &a[row * d..(row + 1) * d]));
            vectorized(
                #[inline(always)]
                || combine_row(src, choices, wire, shared, base, out),
            );
        }
    });
}

#[inline(always)]
fn combine_row(
    src: &[f32],
    choices: Choices<'_>,
    wire: Wire,
    shared: Option<&[f32]>,
    base: Option<&[f32]>,
    out: &mut [f32],
) {
    let d = out.len();
    for start in (0..d).step_by(COLUMNS) {
        let width = COLUMNS.min(d - start);
        let columns = start..start + width;
        let mut routed = [0f32; COLUMNS];
        sum_by_node(src, d, choices, wire, start, width, &mut routed);
        let out = &mut out[columns.clone()];
        let routed = &routed[..width];
        match shared {
            Some(shared) => add_into(out, &shared[columns.clone()], routed),
            None => out.copy_from_slice(routed),
        }
        if let Some(base) = base {
            out.iter_mut().zip(&base[columns]).for_each(|(o, b)| *o += b);
        }
    }
}

#[inline(always)]
fn add_into(out: &mut [f32], a: &[f32], b: &[f32]) {
    for ((o, a), b) in out.iter_mut().zip(a).zip(b) {
        *o = a + b;
    }
}

/// Sums columns `start..start + width` of a row's expert outputs: experts of a node ascending, then nodes ascending. A
/// sum starts with its first addend, as it does where a node's sum arrives over a wire. The first choice of a node has a
/// row.
#[inline(always)]
fn sum_by_node(
    src: &[f32],
    d: usize,
    choices: Choices<'_>,
    wire: Wire,
    start: usize,
    width: usize,
    total: &mut [f32; COLUMNS],
) {
    let node_of = |choice: usize| choices.experts[choice] as usize / choices.node_size;
    let mut choice = 0;
    while choice < choices.experts.len() {
        let (node, first_node) = (node_of(choice), choice == 0);
        let mut sum = [0f32; COLUMNS];
        sum[..width].copy_from_slice(&row_of(src, d, choices.index[choice])[start..start + width]);
        choice += 1;
        while choice < choices.experts.len() && node_of(choice) == node {
            if choices.index[choice] != NO_ROW {
                let row = &row_of(src, d, choices.index[choice])[start..start + width];
                sum.iter_mut().zip(row).for_each(|(s, v)| *s += v);
            }
            choice += 1;
        }
        if wire == Wire::Bf16 {
            sum.iter_mut().for_each(|s| *s = bf16::round(*s));
        }
        if first_node {
            *total = sum;
        } else {
            total.iter_mut().zip(&sum).for_each(|(t, s)| *t += s);
        }
    }
}
