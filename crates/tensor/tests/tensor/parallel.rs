//! Every task runs once, on any number of threads, wherever the threads were made.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use unisono_tensor::cpu::{Scratch, Threads};

fn counts(threads: &Threads, tasks: usize) -> Vec<usize> {
    let ran: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
    threads.run(tasks, |index| {
        ran[index].fetch_add(1, Ordering::Relaxed);
    });
    ran.into_iter().map(AtomicUsize::into_inner).collect()
}

#[test]
fn each_task_runs_once() {
    for count in [0, 1, 2, 3, 5] {
        let threads = Threads::new(count);
        assert_eq!(threads.count(), count.max(1));
        for tasks in [0, 1, 2, 3, 7, 1000] {
            assert_eq!(counts(&threads, tasks), vec![1; tasks], "{count} threads, {tasks} tasks");
        }
    }
}

#[test]
fn threads_can_be_made_inside_the_threads_of_another_and_used_elsewhere() {
    let outer = Threads::new(2);
    outer.run(4, |_| assert_eq!(counts(&Threads::new(3), 50), vec![1; 50]));
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| assert_eq!(counts(&outer, 50), vec![1; 50]));
        }
    });
}

#[test]
fn threads_that_had_nothing_to_do_for_long_take_part_again() {
    let threads = Threads::new(3);
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(2));
        let (arrived, late) = (AtomicUsize::new(0), Instant::now() + Duration::from_secs(60));
        // Each task waits for the others, so that no thread can run two.
        threads.run(3, |_| {
            arrived.fetch_add(1, Ordering::Relaxed);
            while arrived.load(Ordering::Relaxed) < 3 {
                assert!(Instant::now() < late, "a thread has not come");
                std::thread::yield_now();
            }
        });
    }
}

#[test]
fn rows_and_chunks_cover_everything_once() {
    let threads = Threads::new(2);
    for (len, block) in [(0, 4), (1, 4), (8, 4), (9, 4), (100, 7), (5, 0)] {
        let mut data = vec![0usize; len];
        threads.chunks_mut(&mut data, block, |index, chunk| {
            chunk.iter_mut().enumerate().for_each(|(at, value)| *value += 1 + index * block.max(1) + at);
        });
        assert_eq!(data, (1..=len).collect::<Vec<_>>(), "{len} in chunks of {block}");
        let rows = AtomicUsize::new(0);
        threads.run_rows(len, block, |range| {
            assert!(range.len() <= block.max(1) && range.end <= len);
            rows.fetch_add(range.sum::<usize>(), Ordering::Relaxed);
        });
        assert_eq!(rows.into_inner(), (0..len).sum::<usize>());
    }
}

#[test]
fn a_panic_in_a_task_reaches_the_caller() {
    let threads = Threads::new(2);
    let run = || threads.run(10, |index| assert!(index != 7, "task seven"));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
    assert!(result.is_err());
    assert_eq!(counts(&threads, 10), vec![1; 10]);
}

#[test]
fn scratch_is_aligned_reused_and_never_shared() {
    let (mut a, mut b) = (Scratch::take(100), Scratch::take(50));
    a.fill(1.0);
    b.fill(2.0);
    assert!(a.len() == 100 && b.len() == 50 && a.iter().all(|x| *x == 1.0));
    let address = a.as_ptr();
    assert_eq!(address as usize % 64, 0);
    drop((a, b));
    assert_eq!(Scratch::take(97).as_ptr(), address);
    assert!(Scratch::take(0).is_empty());
}
