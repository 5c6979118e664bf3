//! Stops a save after each of its file-system operations, and fails each of them, and looks at what is left.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::error::{Error, Result};
use crate::folder::{latest, list};
use crate::reader::Reader;
use crate::retention::keep_last_with;
use crate::storage::{Disk, Storage};
use crate::writer::{SaveId, Writer};
use crate::{Dtype, Piece};

/// What happens at the chosen operation.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// The process dies: nothing happens from then on. A write that is hit leaves half of its bytes.
    Crash,
    /// The machine loses power: what was not synced is gone, too.
    PowerLoss,
    /// This one operation fails.
    Once(ErrorKind),
    /// From then on nothing can be created, written or synced, as on a full disk.
    Full,
}

/// A folder entry that is not durable yet.
enum Pending {
    Created(PathBuf),
    Renamed { from: PathBuf, to: PathBuf },
}

#[derive(Default)]
struct State {
    before: usize,
    fired: Option<&'static str>,
    unsynced: BTreeSet<PathBuf>,
    pending: Vec<Pending>,
}

struct Faulty {
    fault: Fault,
    state: Mutex<State>,
}

fn rebase(path: &mut PathBuf, from: &Path, to: &Path) {
    if let Ok(rest) = path.strip_prefix(from) {
        *path = to.join(rest);
    }
}

impl State {
    fn rebase(&mut self, from: &Path, to: &Path) {
        for entry in &mut self.pending {
            if let Pending::Created(path) = entry {
                rebase(path, from, to);
            }
        }
        let moved = std::mem::take(&mut self.unsynced).into_iter().map(|mut path| {
            rebase(&mut path, from, to);
            path
        });
        self.unsynced = moved.collect();
    }

    fn lose_power(&mut self) {
        while let Some(entry) = self.pending.pop() {
            match entry {
                Pending::Created(path) if path.is_dir() => fs::remove_dir_all(path).unwrap(),
                Pending::Created(path) => fs::remove_file(path).unwrap(),
                Pending::Renamed { from, to } => {
                    fs::rename(&to, &from).unwrap();
                    self.rebase(&to, &from);
                }
            }
        }
        for path in self.unsynced.iter().filter(|path| path.exists()) {
            let file = OpenOptions::new().write(true).open(path).unwrap();
            file.set_len(file.metadata().unwrap().len() / 2).unwrap();
        }
    }
}

impl Faulty {
    fn new(fault: Fault, before: usize) -> Arc<Self> {
        Arc::new(Self { fault, state: Mutex::new(State { before, ..State::default() }) })
    }

    fn fired(&self) -> Option<&'static str> {
        self.state.lock().unwrap().fired
    }

    /// Lets an operation pass, or not. `half` is done when it is the one that is hit by a crash.
    fn gate(&self, action: &'static str, path: &Path, half: impl FnOnce()) -> Result<()> {
        let mut state = self.state.lock().unwrap();
        let fail = |kind: ErrorKind| Err(Error::storage(action, path)(io::Error::from(kind)));
        if state.fired.is_some() {
            let removal = action.starts_with("remove") || action == "rename";
            return match self.fault {
                Fault::Crash | Fault::PowerLoss => fail(ErrorKind::Interrupted),
                Fault::Full if !removal => fail(ErrorKind::StorageFull),
                Fault::Full | Fault::Once(_) => Ok(()),
            };
        }
        if state.before > 0 {
            state.before -= 1;
            return Ok(());
        }
        state.fired = Some(action);
        match self.fault {
            Fault::Once(kind) => fail(kind),
            Fault::Full => fail(ErrorKind::StorageFull),
            Fault::Crash => {
                half();
                fail(ErrorKind::Interrupted)
            }
            Fault::PowerLoss => {
                half();
                state.lose_power();
                fail(ErrorKind::Interrupted)
            }
        }
    }

    fn note(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }
}

impl Storage for Faulty {
    fn create_dir(&self, path: &Path) -> Result<()> {
        self.gate("create folder", path, || ())?;
        self.note(|state| state.pending.push(Pending::Created(path.into())));
        Disk.create_dir(path)
    }

    fn create_file(&self, path: &Path) -> Result<File> {
        self.gate("create", path, || ())?;
        self.note(|state| {
            state.pending.push(Pending::Created(path.into()));
            state.unsynced.insert(path.into());
        });
        Disk.create_file(path)
    }

    fn write(&self, file: &mut File, path: &Path, bytes: &[u8]) -> Result<()> {
        self.gate("write", path, || file.write_all(&bytes[..bytes.len() / 2]).unwrap())?;
        Disk.write(file, path, bytes)
    }

    fn sync_file(&self, _file: &File, path: &Path) -> Result<()> {
        self.gate("sync", path, || ())?;
        self.note(|state| {
            state.unsynced.remove(path);
        });
        // Noted rather than done: the tests do not wait for the disk.
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> Result<()> {
        self.gate("sync folder", path, || ())?;
        self.note(|state| {
            state.pending.retain(|entry| match entry {
                Pending::Created(at) | Pending::Renamed { to: at, .. } => at.parent() != Some(path),
            });
        });
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.gate("rename", from, || ())?;
        self.note(|state| {
            state.rebase(from, to);
            state.pending.push(Pending::Renamed { from: from.into(), to: to.into() });
        });
        Disk.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> Result<()> {
        self.gate("remove", path, || ())?;
        self.note(|state| forget(state, path));
        Disk.remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> Result<()> {
        self.gate("remove folder", path, || ())?;
        self.note(|state| forget(state, path));
        Disk.remove_dir(path)
    }
}

fn forget(state: &mut State, path: &Path) {
    state.unsynced.remove(path);
    state.pending.retain(|entry| match entry {
        Pending::Created(at) => at != path,
        Pending::Renamed { to, .. } => to != path,
    });
}

/// A storage that works.
fn undisturbed() -> Arc<dyn Storage> {
    Faulty::new(Fault::Crash, usize::MAX)
}

/// The contents of version `version` of a step.
fn contents(version: u8) -> Vec<u8> {
    (0..64u8).map(|byte| byte ^ (version * 37)).collect()
}

fn save(storage: Arc<dyn Storage>, dir: &Path, epoch: u64, step: u64, version: u8) -> Result<()> {
    let bytes = contents(version);
    let id = SaveId { run_id: "test".into(), epoch, step };
    let writer = Writer::begin_on(storage, dir, id)?;
    let halves = bytes.chunks(32).zip([0, 8]).enumerate().map(|(rank, (bytes, start))| {
        let piece = Piece { tensor: "w", dtype: Dtype::F32, shape: &[16], range: start..start + 8, bytes };
        writer.shards().write_shard(&format!("s{rank}"), &[piece])
    });
    let reports = halves.collect::<Result<Vec<_>>>()?;
    writer.commit(reports, serde_json::json!({ "version": version }))?;
    Ok(())
}

/// The versions of the steps that are there. Each must verify.
fn versions(dir: &Path) -> Vec<(u64, u8)> {
    let read = |step| {
        let reader = Reader::open(dir, step).unwrap();
        let version = reader.extra()["version"].as_u64().unwrap() as u8;
        assert_eq!(reader.read("w", 0..16).unwrap(), contents(version));
        reader.verify().unwrap();
        (step, version)
    };
    list(dir).unwrap().iter().map(|listed| read(listed.step)).collect()
}

fn hidden(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('.')).collect()
}

/// A job on a folder of checkpoints, and what may be there after it was disturbed.
struct Scenario {
    setup: fn(&Path),
    job: fn(Arc<dyn Storage>, &Path) -> Result<()>,
    before: &'static [(u64, u8)],
    after: &'static [(u64, u8)],
}

const SCENARIOS: &[Scenario] = &[
    // The first save of a run: its folder does not exist.
    Scenario {
        setup: |_| (),
        job: |storage, dir| save(storage, dir, 1, 20, 2),
        before: &[],
        after: &[(20, 2)],
    },
    // A new step beside an older one.
    Scenario {
        setup: |dir| save(undisturbed(), dir, 1, 10, 1).unwrap(),
        job: |storage, dir| save(storage, dir, 1, 20, 2),
        before: &[(10, 1)],
        after: &[(10, 1), (20, 2)],
    },
    // The same step again, with other contents.
    Scenario {
        setup: |dir| save(undisturbed(), dir, 1, 20, 1).unwrap(),
        job: |storage, dir| save(storage, dir, 2, 20, 2),
        before: &[(20, 1)],
        after: &[(20, 2)],
    },
    // Recovery from a crash between the two renames of a replacement.
    Scenario {
        setup: |dir| {
            save(undisturbed(), dir, 1, 20, 1).unwrap();
            fs::rename(dir.join("step-000020"), dir.join(".replaced-step-000020")).unwrap();
            fs::create_dir(dir.join(".tmp-step-000020-1")).unwrap();
            fs::write(dir.join(".tmp-step-000020-1/manifest.json"), b"{").unwrap();
            fs::create_dir(dir.join(".tmp-removed-step-000010")).unwrap();
        },
        job: |storage, dir| save(storage, dir, 2, 20, 2),
        before: &[(20, 1)],
        after: &[(20, 2)],
    },
];

fn run(
    scenario: &Scenario,
    fault: Fault,
    before: usize,
) -> (tempfile::TempDir, PathBuf, Arc<Faulty>, Result<()>) {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("checkpoints");
    (scenario.setup)(&dir);
    let storage = Faulty::new(fault, before);
    let result = (scenario.job)(Arc::clone(&storage) as _, &dir);
    (folder, dir, storage, result)
}

#[test]
fn a_crash_after_any_operation_loses_nothing_committed() {
    for (number, scenario) in SCENARIOS.iter().enumerate() {
        for fault in [Fault::Crash, Fault::PowerLoss] {
            let mut operations = 0;
            loop {
                let (_folder, dir, storage, result) = run(scenario, fault, operations);
                let place =
                    format!("scenario {number}, {fault:?} at operation {operations}, {:?}", storage.fired());
                let found = versions(&dir);
                if storage.fired().is_none() {
                    result.unwrap();
                    assert_eq!(found, scenario.after, "{place}");
                    break;
                }
                assert!(found == scenario.before || found == scenario.after, "{place}: {found:?}");
                assert_eq!(
                    latest(&dir, &|| ()).unwrap().step,
                    found.last().map(|(step, _)| *step),
                    "{place}"
                );
                save(undisturbed(), &dir, 3, 20, 2).unwrap();
                assert_eq!(versions(&dir), scenario.after, "{place}");
                assert_eq!(hidden(&dir), [""; 0], "{place}");
                operations += 1;
            }
            assert!(operations >= 12, "a save has more operations than the {operations} that were seen");
        }
    }
}

#[test]
fn a_failing_disk_harms_nothing_committed_and_the_partial_save_is_removed() {
    let kinds = [ErrorKind::StorageFull, ErrorKind::ReadOnlyFilesystem, ErrorKind::Other];
    let faults: Vec<_> = kinds.into_iter().map(Fault::Once).chain([Fault::Full]).collect();
    for (number, scenario) in SCENARIOS.iter().enumerate() {
        for &fault in &faults {
            for operations in 0.. {
                let (_folder, dir, storage, result) = run(scenario, fault, operations);
                let Some(action) = storage.fired() else { break };
                let place = format!("scenario {number}, {fault:?} at operation {operations}, {action}");
                let error = result.expect_err(&place);
                assert!(error.is_storage() && !error.is_corrupt() && !error.is_stale(), "{place}: {error}");
                let found = versions(&dir);
                assert!(found == scenario.before || found == scenario.after, "{place}: {found:?}");
                if number < 3 && dir.exists() {
                    let hidden = hidden(&dir);
                    // The former version stays aside while it is not sure that the new one is durable.
                    let left = hidden.iter().filter(|name| !name.starts_with(".replaced")).count();
                    assert!(left == 0, "{place}: {hidden:?}");
                    assert!(hidden.is_empty() || found == scenario.after, "{place}: {hidden:?}");
                }
                save(undisturbed(), &dir, 3, 20, 2).unwrap();
                assert_eq!(versions(&dir), scenario.after, "{place}");
                assert_eq!(hidden(&dir), [""; 0], "{place}");
            }
        }
    }
}

#[test]
fn a_crash_while_old_checkpoints_are_removed_leaves_no_damaged_one() {
    for operations in 0.. {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        for step in [10, 20, 30] {
            save(undisturbed(), dir, 1, step, step as u8 / 10).unwrap();
        }
        let storage = Faulty::new(Fault::Crash, operations);
        let result = keep_last_with(&*storage, dir, NonZeroUsize::MIN, &|| ());
        // `versions` verifies each step that is still listed.
        let found = versions(dir);
        assert_eq!(found.last(), Some(&(30, 3)));
        if storage.fired().is_none() {
            assert_eq!(result.unwrap().removed, [20, 10]);
            assert_eq!((found.len(), hidden(dir).len()), (1, 0));
            break;
        }
        assert!(result.is_err());
        crate::clean(dir, 1).unwrap();
        assert_eq!(versions(dir), found);
        assert!(hidden(dir).is_empty());
        keep_last_with(&*undisturbed(), dir, NonZeroUsize::MIN, &|| ()).unwrap();
        assert_eq!(versions(dir), [(30, 3)]);
    }
}

/// A new version that turns out damaged does not cost the former one.
#[test]
fn recovery_keeps_the_former_version_when_the_new_one_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    save(undisturbed(), dir, 1, 20, 1).unwrap();
    fs::rename(dir.join("step-000020"), dir.join(".replaced-step-000020")).unwrap();
    save_beside(dir);
    crate::clean(dir, 3).unwrap();
    assert_eq!(versions(dir), [(20, 1)]);
    assert!(hidden(dir).is_empty());
}

fn save_beside(dir: &Path) {
    let other = tempfile::tempdir().unwrap();
    save(undisturbed(), other.path(), 2, 20, 2).unwrap();
    fs::create_dir(dir.join("step-000020")).unwrap();
    for name in ["s0.safetensors", "s1.safetensors", "manifest.json"] {
        let mut bytes = fs::read(other.path().join("step-000020").join(name)).unwrap();
        bytes.truncate(bytes.len() - usize::from(name == "s1.safetensors"));
        fs::write(dir.join("step-000020").join(name), bytes).unwrap();
    }
}
