//! The cores that ranks of a node may run on, which launchers share out.

use std::thread::available_parallelism;

use rustix::thread::{CpuSet, sched_getaffinity};

/// A bit for each core.
pub(super) type Cores = [u64; CpuSet::MAX_CPU / 64];

/// Those of this process; none where the system does not say.
pub(super) fn own_cores() -> Cores {
    let mut cores: Cores = [0; _];
    let Ok(set) = sched_getaffinity(None) else { return cores };
    for core in (0..CpuSet::MAX_CPU).filter(|&core| set.is_set(core)) {
        cores[core / 64] |= 1 << (core % 64);
    }
    cores
}

/// Whether the ranks of a node, which may run on `cores`, have one each. `own` are those of this rank, which may have less of their
/// time (`available_parallelism` knows quotas).
pub(super) fn enough_for_all<'a>(own: &Cores, cores: impl IntoIterator<Item = &'a Cores>) -> bool {
    let count = |cores: &Cores| cores.iter().map(|word| word.count_ones() as usize).sum::<usize>();
    let (mut ranks, mut all): (usize, Cores) = (0, [0; _]);
    for cores in cores {
        ranks += 1;
        all.iter_mut().zip(cores).for_each(|(all, word)| *all |= word);
    }
    let time = available_parallelism().map_or(0, usize::from);
    let known = count(&all);
    ranks <= if time < count(own) { known.min(time) } else { known }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cores(numbers: &[usize]) -> Cores {
        let mut cores: Cores = [0; _];
        numbers.iter().for_each(|core| cores[core / 64] |= 1 << (core % 64));
        cores
    }

    #[test]
    fn ranks_that_are_bound_apart_have_a_core_each() {
        let own = cores(&[]);
        let [zero, one, both, far] = [&[0][..], &[1], &[0, 1], &[700]].map(cores);
        assert!(enough_for_all(&own, [&zero, &one]));
        assert!(!enough_for_all(&own, [&zero, &zero]), "both on one core");
        assert!(enough_for_all(&own, [&both, &both]), "not bound");
        assert!(!enough_for_all(&own, [&both, &both, &both]));
        assert!(enough_for_all(&own, [&both, &both, &far]));
        assert!(!enough_for_all(&own, [&own, &zero]), "not known");
    }

    #[test]
    fn this_process_may_run_somewhere() {
        let count: u32 = own_cores().iter().map(|word| word.count_ones()).sum();
        assert!(count as usize >= available_parallelism().map_or(0, usize::from));
    }
}
