//! Who started this process, as launchers say in the environment.

#[cfg(feature = "mpi")]
use std::fs;

#[cfg(feature = "mpi")]
use rustix::process::{Pid, Signal, getppid, kill_process};

/// A process that a launcher started as one of several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launched {
    /// Its number.
    pub rank: usize,
    /// How many there are, where the launcher says so.
    pub size: Option<usize>,
    /// What the launcher is.
    pub by: &'static str,
}

/// Which variables give rank and size, and who sets them. The first whose rank is set counts.
const LAUNCHERS: [(&str, &[&str], &str); 4] = [
    ("OMPI_COMM_WORLD_RANK", &["OMPI_COMM_WORLD_SIZE"], "mpirun (Open MPI)"),
    ("PMIX_RANK", &["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"], "a PMIx launcher"),
    ("PMI_RANK", &["PMI_SIZE"], "mpiexec (MPICH)"),
    ("SLURM_PROCID", &["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"], "srun (Slurm)"),
];

/// What started this process as one of several, if anything did. MPI itself has the last word on rank and size.
pub fn launched() -> Option<Launched> {
    discover(&|name| std::env::var(name).ok())
}

fn discover(variable: &dyn Fn(&str) -> Option<String>) -> Option<Launched> {
    let number = |name: &str| variable(name)?.trim().parse::<usize>().ok();
    LAUNCHERS.iter().find_map(|(rank, sizes, by)| {
        // A Slurm batch script has the variables of a task, too, but is no step.
        if *rank == "SLURM_PROCID" && number("SLURM_STEP_ID").is_none() {
            return None;
        }
        let size = sizes.iter().find_map(|name| number(name));
        Some(Launched { rank: number(rank)?, size, by })
    })
}

/// The programs of Open MPI that start ranks: on the first host, on the others.
#[cfg(feature = "mpi")]
const DAEMONS: [&str; 4] = ["mpirun", "mpiexec", "orterun", "orted"];

/// The process of Open MPI that has started this one: `mpirun` itself, or what stands for it on another host.
#[cfg(feature = "mpi")]
#[derive(Debug, Clone, Copy)]
pub struct Daemon(Pid);

#[cfg(feature = "mpi")]
impl Daemon {
    /// This process's parent, if that is what it is.
    pub fn find() -> Option<Self> {
        getppid().and_then(Self::checked)
    }

    /// The process with this number, if that is what it is.
    pub fn of(process: i32) -> Option<Self> {
        Pid::from_raw(process).and_then(Self::checked)
    }

    fn checked(process: Pid) -> Option<Self> {
        let name = fs::read_to_string(format!("/proc/{}/comm", process.as_raw_nonzero())).ok()?;
        DAEMONS.contains(&name.trim_end()).then_some(Self(process))
    }

    /// The number of the process.
    pub fn process(self) -> i32 {
        self.0.as_raw_nonzero().get()
    }

    /// Ends the sleep it may be in before it sends its next signal. It is told that one of its processes has ended, looks
    /// whether any has, and finds none. False if it has ended itself.
    pub fn wake(self) -> bool {
        kill_process(self.0, Signal::CHILD).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_launcher_that_is_set_counts() {
        let find = |set: &[(&str, &str)]| {
            let set: Vec<(String, String)> = set.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
            discover(&|name| set.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone()))
                .map(|found| (found.rank, found.size, found.by))
        };
        let open_mpi = [("OMPI_COMM_WORLD_RANK", "3"), ("OMPI_COMM_WORLD_SIZE", "4"), ("PMIX_RANK", "9")];
        assert_eq!(find(&open_mpi), Some((3, Some(4), "mpirun (Open MPI)")));
        assert_eq!(find(&[("PMI_RANK", "1"), ("PMI_SIZE", "2")]), Some((1, Some(2), "mpiexec (MPICH)")));
        assert_eq!(find(&[("PMIX_RANK", "1")]), Some((1, None, "a PMIx launcher")));
        let slurm = [("SLURM_PROCID", "5"), ("SLURM_NTASKS", "8"), ("SLURM_STEP_ID", "0")];
        assert_eq!(find(&slurm), Some((5, Some(8), "srun (Slurm)")));
        assert_eq!(find(&slurm[..2]), None, "a batch script is no task");
        assert_eq!(find(&[("OMPI_COMM_WORLD_RANK", "x")]), None);
        assert_eq!(find(&[]), None);
    }
}
