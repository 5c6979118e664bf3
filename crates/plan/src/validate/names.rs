//! One spelling of every name, whatever the source's: GPUs, precisions and ways of sharding. Models are in [`super::model`], which needs
//! to know which there are.

use crate::hardware::Gpu;
use crate::parallelism::Sharding;
use crate::precision::Precision;

/// GPUs that are another one but for what [`sibling`] says.
const SIBLINGS: [&str; 4] = ["A800", "GH200", "A100 PCIe", "H100 PCIe"];

/// Short names, which stand alone: MI300A is another GPU.
const SHORT: [(&str, &str); 3] = [("MI300", "MI300X"), ("MI325", "MI325X"), ("MI355", "MI355X")];

/// Letters and digits, in lower case.
pub(super) fn plain(name: &str) -> String {
    name.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
}

/// The name of a GPU: the longest known one in the text (`NVIDIA H100-80GB SXM`, `GB300NVL72`, `A100/40GB`), or the text.
pub(super) fn gpu(text: &str) -> String {
    let mut wanted = String::new();
    for c in text.to_ascii_uppercase().chars() {
        // `H-100`, but not `H100-80GB`.
        if c.is_ascii_digit() && wanted.len() > 1 && wanted.ends_with(['-', '_', ' ']) {
            let before = &wanted[..wanted.len() - 1];
            if before.ends_with(|c: char| c.is_ascii_alphabetic()) {
                wanted.pop();
            }
        }
        wanted.push(c);
    }
    let ends = |end: usize, also: fn(char) -> bool| !wanted[end..].starts_with(also);
    let holds = |name: &str, also: fn(char) -> bool| {
        wanted.match_indices(&name.to_uppercase()).any(|(at, found)| ends(at + found.len(), also))
    };
    let whole = Gpu::all().iter().map(|gpu| gpu.name).chain(SIBLINGS);
    let whole = whole.filter(|name| holds(name, |c| c.is_ascii_digit())).map(|name| (name.len(), name));
    let short = SHORT.iter().filter(|(name, _)| holds(name, |c| c.is_ascii_alphanumeric()));
    let short = short.map(|(name, of)| (name.len(), *of));
    let Some((_, name)) = whole.chain(short).max_by_key(|(length, _)| *length) else {
        return text.to_string();
    };
    let card = SIBLINGS.iter().find(|of| wanted.contains("PCIE") && **of == format!("{name} PCIe"));
    card.unwrap_or(&name).to_string()
}

/// The GPU of a name that [`gpu`] gave, and whether it is only the nearest one.
pub(super) fn gpu_of(name: &str) -> Result<(Gpu, bool), String> {
    match sibling(name) {
        Some(gpu) => Ok((gpu, true)),
        None => Ok((Gpu::named(name).map_err(|error| error.to_string())?, false)),
    }
}

/// The GPU that a sibling is, with what its maker's data sheet says otherwise. A800 is A100 with less NVLink; GH200 has Hopper's die and
/// about H200's memory; cards have less power and join over PCIe.
fn sibling(name: &str) -> Option<Gpu> {
    let of = |name: &str| Gpu::named(name).ok();
    match name {
        "A800" => Some(Gpu { nvlink_bytes_per_s: 200e9, ..of("A100")? }),
        "GH200" => of("H200"),
        "A100 PCIe" => Some(Gpu { nvlink_bytes_per_s: 32e9, power_w: 300.0, ..of("A100")? }),
        "H100 PCIe" => Some(Gpu {
            bf16_flops: 756e12,
            fp8_flops: 1513e12,
            fp4_flops: 1513e12,
            memory_bytes_per_s: 2.0e12,
            nvlink_bytes_per_s: 64e9,
            power_w: 350.0,
            ..of("H100")?
        }),
        _ => None,
    }
}

/// The format that a text names; `None` where it names none that is known.
pub(super) fn precision(text: &str) -> Option<Precision> {
    let text = plain(text);
    let has = |words: &[&str]| words.iter().any(|word| text.contains(word));
    let begins = |words: &[&str]| words.iter().any(|word| text.starts_with(word));
    Some(match () {
        () if has(&["fp4", "float4", "e2m1"]) => Precision::Nvfp4,
        () if begins(&["mxfp8", "fp8mx", "mxfloat8", "float8mx"]) => Precision::Mxfp8,
        () if has(&["fp8", "float8", "e4m3", "e5m2"]) => Precision::Fp8,
        () if has(&["bf16", "bfloat16", "bfp16"]) => Precision::Bf16,
        () if has(&["fp16", "float16", "f16", "half"]) => Precision::F16,
        () if has(&["32"]) => Precision::F32,
        () => return None,
    })
}

/// One label for all spellings of a format; the text in upper case where it names none. How 8-bit products are scaled, by tensor with a
/// delay, by tensor at once (current scaling) or by block, are releases of their own: the same format at another speed.
pub(super) fn precision_label(text: &str) -> String {
    let words = plain(text);
    let label = precision(text).map(|format| match format {
        Precision::Nvfp4 => "NVFP4",
        Precision::Mxfp8 => "MXFP8",
        Precision::Fp8 if words.contains("fp8cs") || words.contains("current") => "FP8-CS",
        Precision::Fp8 if words.contains("block") => "FP8-BLOCK",
        Precision::Fp8 => "FP8",
        Precision::Bf16 => "BF16",
        Precision::F16 => "FP16",
        Precision::F32 => "FP32",
    });
    label.map_or_else(|| text.to_uppercase(), str::to_string)
}

/// What a text says is split among replicas; `None` where it does not say or says two things. Hybrid sharding repeats what it splits from
/// server to server; it is read as splitting among all.
pub(super) fn sharding(text: &str) -> Option<Sharding> {
    let text = plain(text);
    let has = |words: &[&str]| words.iter().any(|word| text.contains(word));
    match () {
        // Llama 3's, whose gradients stay whole until the pipeline has drained.
        () if has(&["zero2"]) && has(&["fsdp"]) => None,
        () if has(&["zero2", "stage2", "shardgradop"]) => Some(Sharding::Zero2),
        () if has(&["zero3", "stage3", "fsdp", "hsdp", "fullshard", "hybridshard"]) => Some(Sharding::Zero3),
        () if has(&["zero1", "stage1", "distopt", "distributedopt"]) => Some(Sharding::Zero1),
        () if has(&["ddp", "noshard", "zero0"]) || text == "none" => Some(Sharding::None),
        () => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_found_in_any_spelling() {
        let same = [
            ("h100", "H100"),
            ("H100-80GB SXM", "H100"),
            ("NVIDIA H100", "H100"),
            ("DGX H100", "H100"),
            ("8xH100", "H100"),
            ("H-100", "H100"),
            ("H100_80GB", "H100"),
            ("H100SXM", "H100"),
            ("A100/80GB", "A100"),
            ("A100(40GB)", "A100"),
            ("GB300NVL72", "GB300"),
            ("GB200 (NVL72)", "GB200"),
            ("HGX B200", "B200"),
            ("H200-141GB SXM", "H200"),
            ("H20-96GB", "H20"),
            ("AMD Instinct MI300", "MI300X"),
            ("mi325", "MI325X"),
            ("MI 355X", "MI355X"),
            ("A800-SXM4-80GB", "A800"),
            ("GH200 96GB", "GH200"),
            ("H100 PCIe", "H100 PCIe"),
            ("A100-PCIE-40GB", "A100 PCIe"),
            ("MI300A", "MI300A"),
            ("V100", "V100"),
            ("L40S", "L40S"),
            ("RTX A1000", "RTX A1000"),
            ("", ""),
        ];
        for (text, name) in same {
            assert_eq!(gpu(text), name, "{text}");
        }
        assert!(gpu_of("V100").is_err() && gpu_of("L40S").is_err() && gpu_of("MI300A").is_err());
        let (found, nearest) = gpu_of("A800").expect("a sibling");
        assert_eq!((found.name, found.nvlink_bytes_per_s, nearest), ("A100", 200e9, true));
        assert!(SIBLINGS.iter().all(|name| gpu_of(name).is_ok_and(|(_, nearest)| nearest)));
    }

    #[test]
    fn formats_are_found_in_any_spelling() {
        let said = |text: &str| precision_label(text);
        for text in ["bf16", "BF16", "amp_bf16", "bfloat16", "bf16-mixed", "BF16 (fp32 gradients)"] {
            assert_eq!(said(text), "BF16", "{text}");
        }
        for text in ["fp8", "amp_fp8", "float8", "E4M3", "torch.float8_e4m3fn"] {
            assert_eq!(said(text), "FP8", "{text}");
        }
        for text in ["MXFP8", "FP8-MX", "mx-fp8"] {
            assert_eq!(said(text), "MXFP8", "{text}");
        }
        let scaled = ["FP8-CS", "FP8-CS (FP8-MX)", "fp8 current scaling", "FP8 blockwise"].map(said);
        assert_eq!(scaled, ["FP8-CS", "FP8-CS", "FP8-CS", "FP8-BLOCK"]);
        let others = ["float16", "TF32", "NVFP4(unverified: fp8 too)", "", "int4"].map(said);
        assert_eq!(others, ["FP16", "FP32", "NVFP4", "", "INT4"]);
    }

    #[test]
    fn sharding_is_read_in_any_spelling() {
        for text in
            ["ZeRO-3", "zero3", "ZeRO stage 3", "FSDP2", "HSDP", "FULL_SHARD", "HYBRID_SHARD", "dist-optfsdp"]
        {
            assert_eq!(sharding(text), Some(Sharding::Zero3), "{text}");
        }
        for text in ["ZeRO-2", "zero2", "SHARD_GRAD_OP"] {
            assert_eq!(sharding(text), Some(Sharding::Zero2), "{text}");
        }
        for text in ["ZeRO-1", "zero 1", "dist-opt", "distributed optimizer"] {
            assert_eq!(sharding(text), Some(Sharding::Zero1), "{text}");
        }
        assert_eq!((sharding("DDP"), sharding("NO_SHARD")), (Some(Sharding::None), Some(Sharding::None)));
        let unsaid = ["", "EP only", "FSDP(ZeRO-2-like within PP)"].map(sharding);
        assert_eq!(unsaid, [None; 3]);
    }
}
