//! How the process keeps memory that it has freed.

use std::sync::atomic::{AtomicBool, Ordering};

/// Whether [`keep_freed_memory`] was called.
static KEPT: AtomicBool = AtomicBool::new(false);

/// Tells the C library's allocator to keep what is freed for the rest of the process.
///
/// Buffers are recycled by their [`Pool`](crate::Pool), but the product library allocates its packing buffers anew for
/// every product. By default glibc hands the ends of its heaps back to the system when they
/// are free, and asks for them again a moment later: system calls and page faults in every step. The heaps of threads that compute
/// also ask for huge pages where such buffers lie, as [`Pool`](crate::Pool) does; each thread has a heap of its own, or all would
/// wait for one lock at every product. Call it once, at the start of the program. Other
/// allocators are left as they are.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        let options = [
            // Larger blocks come from the system one by one; the largest value glibc takes.
            (libc::M_MMAP_THRESHOLD, 32 << 20),
            (libc::M_TRIM_THRESHOLD, i32::MAX),
            // Heaps grow in large steps, of which pages that nobody has used take no memory.
            (libc::M_TOP_PAD, 64 << 20),
        ];
        for (option, value) in options {
            // SAFETY: mallopt takes any option and value; it only sets parameters of the allocator, under its lock.
            unsafe { libc::mallopt(option, value) };
        }
    }
    KEPT.store(true, Ordering::Relaxed);
    prepare_thread();
}

/// Makes the calling thread's heap ready for products and other large blocks, if the process keeps its memory. [`Threads`](super::Threads) calls it on
/// threads that compute.
pub fn prepare_thread() {
    thread_local! {
        static READY: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
    }
    if KEPT.load(Ordering::Relaxed) && !READY.replace(true) {
        ask_for_huge_pages();
    }
}

/// Asks for huge pages where the calling thread's next blocks will lie.
fn ask_for_huge_pages() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        use crate::buffer::HUGE_PAGE;
        /// As much as fits a thread's heap at once and does not come from the system alone; unused pages take no memory.
        const BYTES: usize = 31 << 20;
        // SAFETY: the block is freed and never written to. Advice changes no contents, and the range, whole pages inside the
        // block, is the allocator's own.
        unsafe {
            let block = libc::malloc(BYTES);
            let start = (block as usize).next_multiple_of(HUGE_PAGE);
            let end = (block as usize + BYTES) / HUGE_PAGE * HUGE_PAGE;
            if !block.is_null() {
                libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE);
            }
            libc::free(block);
        }
    }
}
