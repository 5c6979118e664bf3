//! The constants that are fitted, by name, with the value that stands for not knowing better.

use unisono_plan::{Constants, FITTED};

/// A fitted constant.
pub struct Knob {
    /// What it belongs to and what it is.
    pub name: String,
    /// Where it is.
    pub reach: Box<dyn Fn(&mut Constants) -> &mut f64 + Send + Sync>,
    /// The generation of GPUs whose rows it prices; of all if `None`.
    pub generation: Option<usize>,
    /// The software whose rows it prices; of all if `None`.
    pub software: Option<usize>,
    /// What kernels and links alone would say, or a guess.
    pub neutral: f64,
    /// How far from it a value is expected, in logarithms.
    pub spread: f64,
    /// The range that makes sense.
    pub range: [f64; 2],
}

pub const GENERATIONS: [&str; 5] = ["A100", "Hopper", "Blackwell", "Grace", "MI300"];
pub const SOFTWARE: [&str; 7] = [
    "MegatronCore",
    "MegatronCoreGraphs",
    "Megatron2021",
    "DeepSpeed2021",
    "TorchEager",
    "TorchCompiled",
    "Xla",
];

macro_rules! knobs {
    ($found:ident, $names:ident, $group:ident, $($field:ident $neutral:literal $spread:literal $range:expr),* $(,)?) => {
        for (at, name) in $names.iter().enumerate() {
            let of_gpu = stringify!($group) == "gpus";
            $($found.push(Knob {
                name: format!("{name}.{}", stringify!($field)),
                reach: Box::new(move |c: &mut Constants| &mut c.$group[at].$field),
                generation: of_gpu.then_some(at),
                software: (!of_gpu).then_some(at),
                neutral: $neutral,
                spread: $spread,
                range: $range,
            });)*
        }
    };
}

/// All of them.
pub fn knobs() -> Vec<Knob> {
    let mut found: Vec<Knob> = Vec::new();
    knobs!(found, GENERATIONS, gpus, gemm 1.1 0.15 [0.8, 2.0], gemm_fp8 1.1 0.2 [0.6, 2.5],
        gemm_fp4 1.1 0.2 [0.6, 3.0], grouped 1.2 0.3 [0.7, 3.0], attention 1.1 0.2 [0.6, 3.0],
        memory 1.1 0.3 [0.4, 4.0], host 1.0 0.3 [0.3, 2.0]);
    knobs!(found, SOFTWARE, software, memory 1.0 0.4 [0.3, 5.0], attention 1.0 0.3 [0.5, 4.0],
        grouped 1.0 0.3 [0.4, 3.0], dispatch 1.0 0.7 [0.1, 4.0], launch_s 2e-5 0.8 [5e-7, 2e-4],
        moe_launch 1.5 0.5 [0.3, 10.0], expert_launch 0.1 1.0 [0.005, 2.0],
        tensor_exposed 0.5 0.6 [0.05, 1.2], data_exposed 0.3 0.8 [0.05, 1.2]);
    macro_rules! common {
        ($($field:ident $neutral:literal $spread:literal $range:expr),* $(,)?) => {
            $(found.push(Knob {
                name: stringify!($field).to_string(),
                reach: Box::new(|c: &mut Constants| &mut c.common.$field),
                generation: None,
                software: None,
                neutral: $neutral,
                spread: $spread,
                range: $range,
            });)*
        };
    }
    common!(dispatch 0.5 0.7 [0.1, 4.0], all_to_all 0.7 0.7 [0.1, 4.0], network 1.0 0.3 [0.6, 3.0], expert_exposed 0.5 0.7 [0.02, 1.0],
        context_exposed 0.5 0.7 [0.02, 1.0], message_exposed 0.5 0.7 [0.02, 1.0], straggler 0.01 0.5 [0.001, 0.05],
        scan 1.5 0.5 [1.0, 10.0], norm 3.0 0.5 [1.3, 6.0], awaited 0.5 0.5 [0.02, 1.5], step_s 0.01 1.0 [0.001, 0.2]);
    for knob in &mut found {
        // Graphs and whole programs launch next to nothing, compiled layers little; the first PyTorch was slow.
        knob.neutral = match knob.name.as_str() {
            "MegatronCoreGraphs.launch_s" | "Xla.launch_s" => 5e-6,
            "TorchCompiled.launch_s" => 1e-5,
            "MegatronCore.launch_s" => 3e-5,
            "Megatron2021.launch_s" => 5e-5,
            _ => knob.neutral,
        };
    }
    found.retain(|knob| !without_evidence(&knob.name));
    found
}

/// Constants that no run could tell apart: older GPUs have no narrow products, software that trains no experts here launches
/// none, and each kind of kernel has one reference software or GPU whose factor is 1.
fn without_evidence(name: &str) -> bool {
    let (owner, field) = name.split_once('.').unwrap_or(("", name));
    let narrow = matches!(owner, "A100" | "MI300") && field.starts_with("gemm_") || name == "Hopper.gemm_fp4";
    let dense_only = matches!(owner, "Megatron2021" | "DeepSpeed2021" | "Xla" | "A100")
        && matches!(field, "moe_launch" | "expert_launch" | "grouped" | "dispatch");
    let reference = owner == "MegatronCore"
        && matches!(field, "memory" | "attention" | "grouped" | "dispatch")
        || matches!(name, "A100.host" | "Hopper.host");
    narrow || dense_only || reference || owner == "DeepSpeed2021" && field != "data_exposed"
}

/// Where a fit starts that must not know the fitted values.
pub fn neutral() -> Constants {
    let mut constants = FITTED.clone();
    for knob in knobs() {
        *(knob.reach)(&mut constants) = knob.neutral;
    }
    constants
}
