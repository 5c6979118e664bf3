//! How the process keeps memory that it has freed.

/// Tells the C library's allocator to keep what is freed, in one arena, for the rest of the process.
///
/// Buffers are recycled by their [`Pool`](crate::Pool), but the product library allocates its packing buffers anew for
/// every product. By default glibc gives each thread heaps of its own, hands their ends back to the system when they
/// are free, and asks for them again a moment later: system calls and page faults in every step. The heap's beginning, where
/// such buffers lie, also asks for huge pages, as [`Pool`](crate::Pool) does. Call it once, at the start of the program. Other
/// allocators are left as they are.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// Larger blocks come from the system one by one; the largest value glibc takes.
        const LARGEST_KEPT_BLOCK: i32 = 32 << 20;
        let options = [
            (libc::M_ARENA_MAX, 1),
            (libc::M_MMAP_THRESHOLD, LARGEST_KEPT_BLOCK),
            (libc::M_TRIM_THRESHOLD, i32::MAX),
            // The heap grows in large steps, of which pages that nobody has used take no memory.
            (libc::M_TOP_PAD, 64 << 20),
        ];
        for (option, value) in options {
            // SAFETY: mallopt takes any option and value; it only sets parameters of the allocator, under its lock.
            unsafe { libc::mallopt(option, value) };
        }
        ask_for_huge_pages(LARGEST_KEPT_BLOCK as usize / 2);
    }
}

/// Makes the heap grow by a block of `bytes`, with what it grows beyond, and asks for huge pages from there to its end.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn ask_for_huge_pages(bytes: usize) {
    use crate::buffer::HUGE_PAGE;
    // SAFETY: the block is freed and never written to. Advice changes no contents, and the range, whole pages from the block to
    // the end of the heap, is the allocator's own; with an allocator whose blocks lie elsewhere it is empty, or too large to be what the heap grew by.
    unsafe {
        let block = libc::malloc(bytes);
        let start = (block as usize).next_multiple_of(HUGE_PAGE);
        let end = libc::sbrk(0) as usize;
        if !block.is_null() && start < end && end - start < 16 * bytes {
            libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE);
        }
        libc::free(block);
    }
}
