//! What is saved on one layout is read on any other; what does not fit together is refused.

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZeroUsize;

use crate::common::{Tensor, id, load, save, tensors};
use proptest::prelude::*;
use unisono_checkpoint::{
    Difference, Dtype, Error, Piece, Reader, ShardReport, ShardWriter, Writer, clean, compare, keep_last,
    latest, list, tensor_hash, verify,
};

#[test]
fn any_cut_reads_back_whole() {
    let folder = tempfile::tempdir().unwrap();
    let saved = tensors(1);
    for ranks in 1..=6 {
        let committed = save(folder.path(), id(1, ranks), &saved, ranks).unwrap();
        assert_eq!(committed.path, folder.path().join(format!("step-{ranks:06}")));
        let reader = Reader::open(folder.path(), ranks).unwrap();
        assert_eq!(load(&reader).unwrap(), saved);
        assert_eq!(reader.extra()["tokens"], 4096);
        assert_eq!((reader.step(), reader.epoch(), reader.run_id()), (ranks, 1, "test"));
        let verified = verify(folder.path(), ranks).unwrap();
        assert_eq!((verified.files as u64, verified.bytes), (ranks, committed.bytes));
    }
    let (first, last) = (Reader::open(folder.path(), 1).unwrap(), Reader::open(folder.path(), 6).unwrap());
    assert_eq!(compare(&first, &last).unwrap(), None);
    for tensor in &saved {
        assert_eq!(tensor_hash(&first, &tensor.name).unwrap(), blake3::hash(&tensor.bytes));
        assert_eq!(tensor_hash(&last, &tensor.name).unwrap(), blake3::hash(&tensor.bytes));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// One tensor cut at random places, pieces dealt to random shards, read by random ranges.
    #[test]
    fn random_cuts_and_ranges(
        len in 1u64..300,
        mut cuts in prop::collection::vec(0.0..1.0f64, 0..12),
        shards in prop::collection::vec(0usize..4, 13),
        ranges in prop::collection::vec((0.0..1.0f64, 0.0..1.0f64), 8),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let tensor = Tensor::new("w", Dtype::F32, &[len], len);
        cuts.extend([0.0, 1.0]);
        let mut places: Vec<u64> = cuts.iter().map(|cut| (cut * len as f64) as u64).collect();
        places.sort_unstable();
        let mut files: BTreeMap<usize, Vec<Piece<'_>>> = BTreeMap::new();
        for (pair, shard) in places.windows(2).zip(&shards) {
            files.entry(*shard).or_default().push(tensor.piece(pair[0], pair[1]));
        }
        // Two empty pieces at one place have one name, which one shard cannot hold twice.
        for pieces in files.values_mut() {
            pieces.dedup_by(|a, b| a.range == b.range);
        }
        let writer = Writer::begin(folder.path(), id(1, 7)).unwrap();
        let reports = files.iter().map(|(shard, pieces)| {
            writer.shards().write_shard(&format!("s{shard}"), pieces).unwrap()
        });
        let reports = reports.collect();
        writer.commit(reports, serde_json::Value::Null).unwrap();
        let reader = Reader::open(folder.path(), 7).unwrap();
        for (a, b) in ranges {
            let (a, b) = ((a * len as f64) as u64, (b * len as f64) as u64);
            let (start, end) = (a.min(b), a.max(b));
            let expected = &tensor.bytes[4 * start as usize..4 * end as usize];
            prop_assert_eq!(&reader.read("w", start..end).unwrap(), expected);
            let mut out = vec![0; expected.len()];
            reader.read_into("w", start..end, &mut out).unwrap();
            prop_assert_eq!(&out, expected);
        }
    }
}

#[test]
fn ranks_write_concurrently_and_send_reports_as_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, saved) = (folder.path(), tensors(5));
    let writer = Writer::begin(dir, id(1, 20)).unwrap();
    let reports = std::thread::scope(|scope| {
        let write = |(rank, tensor): (usize, &Tensor)| {
            let shard = ShardWriter::join(dir, &id(1, 20)).unwrap();
            let pieces = [tensor.piece(0, tensor.len())];
            shard.write_shard(&format!("rank-{rank}"), &pieces).unwrap().to_bytes().unwrap()
        };
        let ranks: Vec<_> = saved.iter().enumerate().map(|rank| scope.spawn(move || write(rank))).collect();
        ranks
            .into_iter()
            .map(|rank| ShardReport::from_bytes(&rank.join().unwrap()).unwrap())
            .collect::<Vec<_>>()
    });
    // The order of arrival does not matter.
    let reversed: Vec<_> = reports.into_iter().rev().collect();
    writer.commit(reversed, serde_json::Value::Null).unwrap();
    assert_eq!(load(&Reader::open(dir, 20).unwrap()).unwrap(), saved);
}

#[test]
fn shards_open_as_safetensors() {
    let folder = tempfile::tempdir().unwrap();
    let saved = tensors(2);
    let committed = save(folder.path(), id(1, 1), &saved, 2).unwrap();
    let file = fs::read(committed.path.join("dense-00-of-02.safetensors")).unwrap();
    let opened = safetensors::SafeTensors::deserialize(&file).unwrap();
    let half = opened.tensor("model.embed.weight[0..40]").unwrap();
    assert_eq!((half.shape(), half.dtype()), (&[40][..], safetensors::Dtype::F32));
    assert_eq!(half.data(), &saved[1].bytes[..160]);
    for (_, view) in opened.iter() {
        let offset = view.data().as_ptr() as usize - file.as_ptr() as usize;
        assert_eq!(offset % (view.dtype().bitsize() / 8), 0, "pieces are aligned to their elements");
    }
    let one = save(folder.path(), id(1, 2), &saved, 1).unwrap();
    let file = fs::read(one.path.join("dense-00-of-01.safetensors")).unwrap();
    let whole = safetensors::SafeTensors::deserialize(&file).unwrap();
    assert_eq!(whole.tensor("model.embed.weight").unwrap().shape(), [16, 5]);
    assert_eq!(whole.len(), saved.len());
}

fn refusal<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    match result {
        Err(Error::Refused { reason }) => reason,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[test]
fn inconsistent_saves_are_refused_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    save(dir, id(1, 10), &tensors(1), 2).unwrap();
    let w = Tensor::new("w", Dtype::F32, &[8], 3);
    let other = Tensor::new("w", Dtype::F32, &[2, 4], 3);
    let commit = |shards: &[Vec<Piece<'_>>], report: &[usize]| {
        let writer = Writer::begin(dir, id(1, 20)).unwrap();
        let write =
            |(number, pieces): (usize, &Vec<_>)| writer.shards().write_shard(&format!("s{number}"), pieces);
        let reports = shards.iter().enumerate().map(write).collect::<Result<Vec<_>, _>>().unwrap();
        refusal(
            writer.commit(report.iter().map(|&at| reports[at].clone()).collect(), serde_json::Value::Null),
        )
    };
    let halves = [vec![w.piece(0, 4)], vec![w.piece(4, 8)]];
    assert!(commit(&halves, &[0]).contains("elements 4..8 of tensor w are in no piece"));
    assert!(commit(&halves, &[1]).contains("elements 0..4 of tensor w are in no piece"));
    assert!(commit(&halves, &[0, 1, 1]).contains("listed twice"));
    assert!(
        commit(&[vec![w.piece(0, 5)], vec![w.piece(4, 8)]], &[0, 1])
            .contains("element 4 of tensor w is in two")
    );
    assert!(commit(&[vec![w.piece(0, 4)], vec![other.piece(4, 8)]], &[0, 1]).contains("[2, 4]"));
    assert!(
        commit(&[vec![w.piece(0, 8)], vec![]], &[0]).contains("s1.safetensors was written, but no report")
    );

    let writer = Writer::begin(dir, id(1, 20)).unwrap();
    let shards = writer.shards();
    for name in ["", "..", "a/b", ".hidden", "ä", "a b"] {
        assert!(refusal(shards.write_shard(name, &[])).contains("shard name"), "{name:?}");
    }
    let bad = Piece { range: 0..9, ..w.piece(0, 8) };
    assert!(refusal(shards.write_shard("a", &[bad])).contains("w[0..9] is outside of 0..8"));
    let bad = Piece { range: 0..7, ..w.piece(0, 8) };
    assert!(refusal(shards.write_shard("a", &[bad])).contains("has 32 bytes, not 28"));
    let bad = Piece { shape: &[u64::MAX, 0, 2], range: 0..0, bytes: &[], ..w.piece(0, 0) };
    assert!(refusal(shards.write_shard("a", &[bad])).contains("more bytes than"));
    let bad = Piece { tensor: "a\"b", ..w.piece(0, 8) };
    assert!(refusal(shards.write_shard("a", &[bad])).contains("tensor name"));
    assert!(refusal(shards.write_shard("a", &[w.piece(0, 8), w.piece(0, 8)])).contains("twice in one shard"));
    shards.write_shard("a", &[w.piece(0, 8)]).unwrap();
    assert!(shards.write_shard("a", &[w.piece(0, 8)]).unwrap_err().is_storage(), "a shard is written once");
    drop(writer);
    assert!(refusal(ShardWriter::join(dir, &id(1, 20)).map(drop)).contains("rank 0"));

    assert_eq!(fs::read_dir(dir).unwrap().count(), 1, "only step 10 is left");
    assert_eq!(latest(dir, &|| ()).unwrap().step, Some(10));
}

#[test]
fn bad_requests_name_the_tensor() {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), id(1, 10), &tensors(1), 2).unwrap();
    let reader = Reader::open(folder.path(), 10).unwrap();
    let message = |result: Result<Vec<u8>, Error>| result.unwrap_err().to_string();
    assert!(message(reader.read("nope", 0..1)).contains("nope"));
    assert!(message(reader.read("model.norm.weight", 0..34)).contains("elements 0..34 are outside of 0..33"));
    #[allow(clippy::reversed_empty_ranges, reason = "that is what is tested")]
    let reversed = reader.read("model.norm.weight", 5..4);
    assert!(message(reversed).contains("5..4"));
    let short = reader.read_into("model.norm.weight", 0..2, &mut [0; 7]).unwrap_err();
    assert!(short.to_string().contains("have 8 bytes, the buffer 7"));
    assert!(matches!(Reader::open(folder.path(), 11), Err(Error::NoSuchStep { step: 11, .. })));
    assert!(matches!(tensor_hash(&reader, "nope"), Err(Error::Request { .. })));
}

#[test]
fn saving_a_step_again() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    assert!(!save(dir, id(1, 10), &tensors(1), 2).unwrap().unchanged);
    assert!(save(dir, id(1, 10), &tensors(1), 2).unwrap().unchanged);
    assert!(!save(dir, id(2, 10), &tensors(9), 3).unwrap().unchanged);
    assert_eq!(load(&Reader::open(dir, 10).unwrap()).unwrap(), tensors(9));
    assert_eq!(fs::read_dir(dir).unwrap().count(), 1);
    // Not taken for unchanged when the files under the same manifest are damaged.
    fs::write(dir.join("step-000010/dense-00-of-03.safetensors"), b"damaged").unwrap();
    assert!(!save(dir, id(2, 10), &tensors(9), 3).unwrap().unchanged);
    assert_eq!(load(&Reader::open(dir, 10).unwrap()).unwrap(), tensors(9));
}

#[test]
fn an_older_epoch_cannot_write() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let w = Tensor::new("w", Dtype::F32, &[8], 3);
    // Epoch 1 stalls in the middle of a save; epoch 2 starts, saves, and epoch 1 wakes up.
    let old = Writer::begin(dir, id(1, 20)).unwrap();
    let report = old.shards().write_shard("a", &[w.piece(0, 8)]).unwrap();
    clean(dir, 2).unwrap();
    let new = Writer::begin(dir, id(2, 20)).unwrap();
    assert!(old.shards().write_shard("b", &[]).unwrap_err().is_stale());
    assert!(old.commit(vec![report], serde_json::Value::Null).unwrap_err().is_stale());
    let report = new.shards().write_shard("a", &[w.piece(0, 8)]).unwrap();
    new.commit(vec![report], serde_json::Value::Null).unwrap();
    let error = Writer::begin(dir, id(1, 40)).err().unwrap();
    assert!(error.is_stale() && error.to_string().contains("epoch 2"));
    assert!(clean(dir, 1).unwrap_err().is_stale());
    assert_eq!(Reader::open(dir, 20).unwrap().epoch(), 2);
}

#[test]
fn keep_last_never_removes_the_last_good_one() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    for step in [10, 20, 30, 40] {
        save(dir, id(1, step), &tensors(step), 2).unwrap();
    }
    let two = NonZeroUsize::new(2).unwrap();
    let damaged = dir.join("step-000040/dense-01-of-02.safetensors");
    let mut bytes = fs::read(&damaged).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&damaged, bytes).unwrap();
    let kept = keep_last(dir, two, &|| ()).unwrap();
    assert_eq!((kept.kept, kept.removed, kept.rejected[0].0), (vec![30, 20], vec![10], 40));
    let found = latest(dir, &|| ()).unwrap();
    assert_eq!((found.step, found.rejected.len(), found.rejected[0].0), (Some(30), 1, 40));
    assert!(found.rejected[0].1.is_corrupt());

    // Of all but the newest only the sizes are compared.
    fs::write(&damaged, b"cut").unwrap();
    save(dir, id(1, 50), &tensors(50), 1).unwrap();
    let kept = keep_last(dir, two, &|| ()).unwrap();
    assert_eq!((kept.kept, kept.removed), (vec![50, 30], vec![20]));
    save(dir, id(1, 60), &tensors(60), 1).unwrap();
    save(dir, id(1, 70), &tensors(70), 1).unwrap();
    assert_eq!(keep_last(dir, two, &|| ()).unwrap().removed, vec![50, 40, 30], "bad ones go with their age");
    let steps: Vec<_> = list(dir).unwrap().iter().map(|listed| (listed.step, listed.state.is_ok())).collect();
    assert_eq!(steps, [(60, true), (70, true)]);

    for step in [60, 70] {
        fs::write(dir.join(format!("step-{step:06}/manifest.json")), b"").unwrap();
    }
    let kept = keep_last(dir, NonZeroUsize::MIN, &|| ()).unwrap();
    assert!(kept.kept.is_empty() && kept.removed.is_empty(), "nothing verifies, nothing is removed");
}

#[test]
fn differences_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let saved = tensors(1);
    save(dir, id(1, 1), &saved, 1).unwrap();
    let open = |step| Reader::open(dir, step).unwrap();

    let mut changed = saved.clone();
    changed[5].bytes[4 * 7..4 * 8].copy_from_slice(&1.5f32.to_le_bytes());
    changed[5].bytes[4 * 9] ^= 1;
    save(dir, id(1, 2), &changed, 3).unwrap();
    let difference = compare(&open(1), &open(2)).unwrap().unwrap();
    assert!(
        matches!(&difference, Difference::Value { tensor, element: 7, .. } if tensor == "model.norm.weight")
    );
    assert!(difference.to_string().contains("1.5 (0x3fc00000)"), "{difference}");

    save(dir, id(1, 3), &saved[1..], 1).unwrap();
    let missing = compare(&open(1), &open(3)).unwrap();
    let tensor = "adam.m/model.embed.weight".to_string();
    assert_eq!(missing, Some(Difference::Missing { tensor: tensor.clone(), in_first: false }));
    assert_eq!(compare(&open(3), &open(1)).unwrap(), Some(Difference::Missing { tensor, in_first: true }));

    let mut turned = saved.clone();
    turned[1].shape = vec![5, 16];
    save(dir, id(1, 4), &turned, 1).unwrap();
    assert!(matches!(compare(&open(1), &open(4)).unwrap(), Some(Difference::Layout { .. })));
}

#[test]
fn numbers_of_the_extra_state_keep_their_bits() {
    let folder = tempfile::tempdir().unwrap();
    let numbers: Vec<f64> = (1..2000).map(|n| 1.0 / f64::from(n) * 1e-7).collect();
    let extra = serde_json::json!({"losses": numbers, "tokens": u64::MAX});
    Writer::begin(folder.path(), id(1, 1)).unwrap().commit(Vec::new(), extra.clone()).unwrap();
    assert_eq!(Reader::open(folder.path(), 1).unwrap().extra(), &extra);
    let large = serde_json::json!({"text": "x".repeat(2 << 20)});
    let result = Writer::begin(folder.path(), id(1, 2)).unwrap().commit(Vec::new(), large);
    assert!(refusal(result).contains("extra state"));
}

#[test]
fn a_folder_that_does_not_exist_has_no_checkpoints() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("a/b/c");
    assert_eq!(latest(&dir, &|| ()).unwrap().step, None);
    assert!(list(&dir).unwrap().is_empty());
    assert!(!dir.exists());
    save(&dir, id(1, 1), &tensors(1), 1).unwrap();
    assert_eq!(latest(&dir, &|| ()).unwrap().step, Some(1));
}
