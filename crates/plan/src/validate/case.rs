//! A row as its source wrote it: every column read, nothing inferred but the usual spelling of a name.

use crate::parallelism::{Parallelism, Sharding};
use crate::table::{self, Row};

use super::memory::MemoryKind;
use super::model::Models;
use super::{GIB, golden, measured, names};

/// What a step's seconds are counted in.
const SECONDS: [(&str, f64); 11] = [
    ("s", 1.0),
    ("sec", 1.0),
    ("secs", 1.0),
    ("second", 1.0),
    ("seconds", 1.0),
    ("ms", 1e-3),
    ("msec", 1e-3),
    ("milliseconds", 1e-3),
    ("min", 60.0),
    ("minute", 60.0),
    ("minutes", 60.0),
];

/// What tokens per second are counted in.
const TOKENS: [(&str, f64); 5] = [("tok", 1.0), ("token", 1.0), ("tokens", 1.0), ("k", 1e3), ("m", 1e6)];

/// What 10^12 operations per second are counted in.
const TERAFLOPS: [(&str, f64); 9] = [
    ("t", 1.0),
    ("tf", 1.0),
    ("tflop", 1.0),
    ("tflops", 1.0),
    ("teraflops", 1.0),
    ("gflops", 1e-3),
    ("pf", 1e3),
    ("pflop", 1e3),
    ("pflops", 1e3),
];

/// What GiB are counted in. GB is not here: it stands for either, which differ by more than predictions may.
const GIBIBYTES: [(&str, f64); 3] = [("gib", 1.0), ("mib", 1.0 / 1024.0), ("tib", 1024.0)];

/// GPUs at most, hence degrees too: a larger number is as one that cannot be read, and no product of them overflows.
const MOST_GPUS: u64 = 1 << 20;

/// What a row reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A measured run.
    Run,
    /// A value that a continuous-integration test holds: good for memory, too small and too shared for time.
    Golden,
    /// A plan that ran out of memory.
    OutOfMemory,
}

/// A published measurement. Absent and unreadable numbers are `None`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Case {
    pub id: String,
    pub file: String,
    pub source: String,
    pub kind: Kind,
    /// As [`Models::canonical`] spells it.
    pub model_key: String,
    pub printed: String,
    pub custom: String,
    pub shape: Shape,
    /// As [`names::gpu`] spells it.
    pub gpu: String,
    pub gpus: Option<u64>,
    /// As [`names::precision_label`] spells it.
    pub precision: String,
    pub sequence: Option<u64>,
    pub global_batch: Option<u64>,
    pub degrees: Degrees,
    pub sharding: Option<Sharding>,
    /// As the source writes it.
    pub sharding_text: String,
    pub recompute: String,
    pub framework: String,
    /// Release of the software where the source names one, such as 26.04 or 26.04.01: year, month and patch, two digits each.
    pub release: Option<u64>,
    pub routing: String,
    pub step_s: Option<f64>,
    pub tokens_per_s_per_gpu: Option<f64>,
    pub tflops_per_gpu: Option<f64>,
    pub convention: String,
    /// Whether the source says that virtual stages do not apply.
    pub not_interleaved: bool,
    pub memory_gib: Option<f64>,
    /// [`measured::COLUMNS`] as printed.
    pub measured: [String; 4],
}

/// The numbers of a layout; `None` where the source prints none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Degrees {
    pub micro_batch: Option<u64>,
    pub tensor: Option<u64>,
    pub pipeline: Option<u64>,
    pub virtual_stages: Option<u64>,
    pub context: Option<u64>,
    pub expert: Option<u64>,
    pub expert_tensor: Option<u64>,
    pub data: Option<u64>,
}

/// The numbers of `custom_arch`: `L14 h7168 ffn18432 a128 kv8 E64 k8 moeffn2048 v51200`, or `layers=4`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Shape {
    pub layers: Option<u64>,
    pub hidden: Option<u64>,
    pub heads: Option<u64>,
    pub kv_heads: Option<u64>,
    pub ffn: Option<u64>,
    pub experts: Option<u64>,
    pub top_k: Option<u64>,
    pub expert_ffn: Option<u64>,
    pub vocab: Option<u64>,
}

impl Case {
    /// Reads a row whose model may be one of `models`.
    pub(super) fn read(row: Row<'_>, models: &Models) -> Self {
        let text = |column: &str| row.text(column).to_string();
        let degree = |column: &str| row.count(column).filter(|degree| *degree <= MOST_GPUS);
        let kind = match row.text("kind").to_ascii_lowercase().as_str() {
            "ci_golden" => Kind::Golden,
            "oom" => Kind::OutOfMemory,
            _ => Kind::Run,
        };
        let batch_tokens = table::tokens(row.text("gbs"));
        let mut case = Self {
            id: text("id"),
            file: text("file"),
            source: text("source"),
            kind,
            model_key: models.canonical(row.text("model_key")),
            printed: text("model_as_printed"),
            custom: text("custom_arch"),
            shape: Shape::read(row.text("custom_arch")),
            gpu: names::gpu(row.text("gpu")),
            gpus: degree("n_gpus"),
            precision: names::precision_label(row.text("precision")),
            sequence: row.count("seq"),
            global_batch: row.count("gbs").filter(|_| batch_tokens.is_none()),
            degrees: Degrees {
                micro_batch: degree("mbs"),
                tensor: degree("tp"),
                pipeline: degree("pp"),
                virtual_stages: degree("vpp"),
                context: degree("cp"),
                expert: degree("ep"),
                expert_tensor: degree("etp"),
                data: degree("dp"),
            },
            sharding: names::sharding(row.text("sharding")),
            sharding_text: text("sharding"),
            recompute: text("recompute"),
            framework: text("framework"),
            release: release(row.text("source")),
            routing: text("routing"),
            step_s: row.quantity("step_time_s", &SECONDS),
            tokens_per_s_per_gpu: row.quantity("tokens_per_s_per_gpu", &TOKENS),
            tflops_per_gpu: row.quantity("tflops_per_gpu", &TERAFLOPS),
            convention: text("tflops_convention"),
            not_interleaved: matches!(row.text("vpp"), "n/a" | "N/A" | "-"),
            memory_gib: row.quantity("mem_max_gib", &GIBIBYTES),
            measured: measured::COLUMNS.map(text),
        };
        case.read_names();
        // A batch of so many tokens, where they are whole sequences.
        let batch = batch_tokens.zip(case.sequence).filter(|(tokens, of)| tokens.is_multiple_of(*of));
        case.global_batch = case.global_batch.or(batch.map(|(tokens, of)| tokens / of));
        // A test sets what it does not leave at 1.
        case.not_interleaved |= case.kind == Kind::Golden && case.degrees.virtual_stages.is_none();
        let interleaved = case.mentions("interleaved") || case.mentions("vpp");
        case.not_interleaved |= (case.mentions("1f1b") && !interleaved) || case.is_zero_bubble();
        case
    }

    /// Fills what the columns leave blank from what names spell out: `TP1 PP4 VPP2 EP8 mbs2 seq8192`.
    fn read_names(&mut self) {
        let names = format!("{} {}", self.printed, self.framework);
        let fill = |field: &mut Option<u64>, keys: &[&str]| {
            *field = field.or_else(|| keys.iter().find_map(|key| spelled(&names, key)));
        };
        let degrees = &mut self.degrees;
        fill(&mut degrees.micro_batch, &["mbs"]);
        fill(&mut degrees.tensor, &["tp"]);
        fill(&mut degrees.pipeline, &["pp"]);
        if self.kind != Kind::Golden {
            fill(&mut degrees.virtual_stages, &["vpp", "vp"]);
        }
        fill(&mut degrees.context, &["cp"]);
        fill(&mut degrees.expert, &["ep"]);
        fill(&mut degrees.expert_tensor, &["etp"]);
        fill(&mut self.sequence, &["seq"]);
        fill(&mut self.global_batch, &["gbs"]);
        fill(&mut self.shape.layers, &["layers"]);
        if self.kind == Kind::Golden {
            let stages = golden::virtual_stages(self, spelled(&names, "vp"));
            self.degrees.virtual_stages = self.degrees.virtual_stages.or(stages);
        }
    }

    /// Whether the pipeline's schedule is one of the zero-bubble family.
    pub(super) fn is_zero_bubble(&self) -> bool {
        ["zero-bubble", "zbv", "v-half", "v-min", "dualpipe"].iter().any(|name| self.mentions(name))
    }

    /// Why its memory says nothing of the plan that is priced, if so.
    pub(super) fn incomparable_memory(&self, layout: &Parallelism) -> Option<&'static str> {
        // Activations are in proportion to the tokens of a micro-batch.
        if [self.sequence, self.degrees.micro_batch, self.global_batch].iter().all(Option::is_none) {
            return Some("memory of a micro-batch whose tokens are not printed");
        }
        // zbv, v-half and v-min are priced as a schedule that takes as long and holds more.
        if ["zbv", "v-half", "v-min"].iter().any(|name| self.mentions(name)) {
            return Some("memory of a schedule along a V that the planner does not have");
        }
        // Tests run on one server where they do not say; release tests on as many as they need.
        let unknown = self.gpus.is_none() && self.mentions("release") && layout.sharding != Sharding::None;
        unknown.then_some("memory shared by replicas whose number is not printed")
    }

    /// Whether there is no plan to price: a rate of a model on a GPU, and nothing else.
    pub(super) fn says_nothing_of_the_plan(&self) -> bool {
        let degrees = &self.degrees;
        let sizes =
            [self.gpus, self.global_batch, self.sequence, degrees.tensor, degrees.pipeline, degrees.expert];
        sizes.iter().all(Option::is_none)
    }

    /// The kind of memory that the row gives. Software that is built on Megatron prints what the last rank, which knows the loss and
    /// writes the log, has allocated; torchtitan what is reserved.
    pub(super) fn memory_kind(&self) -> MemoryKind {
        match self.kind {
            Kind::Golden if !self.printed.contains("memory") => MemoryKind::AllocatedLast,
            _ if ["primus", "nemo", "megatron-bridge"].iter().any(|name| self.mentions(name)) => {
                MemoryKind::AllocatedLast
            }
            _ if self.mentions("torchtitan") => MemoryKind::ReservedFullest,
            _ => MemoryKind::AllocatedFullest,
        }
    }

    /// The measured peak in GiB. Megatron-Bridge prints billions of bytes, whatever its tables call them.
    pub(super) fn measured_gib(&self) -> Option<f64> {
        let unit = if self.mentions("megatron-bridge") { 1e9 / GIB } else { 1.0 };
        self.memory_gib.map(|printed| unit * printed)
    }

    /// Whether any name of the row contains `word`, in any case.
    pub(super) fn mentions(&self, word: &str) -> bool {
        [&self.printed, &self.framework, &self.recompute, &self.routing, &self.sharding_text]
            .iter()
            .any(|text| text.to_lowercase().contains(word))
    }

    /// Whether all that a prediction of step time needs is printed.
    pub(super) fn is_complete(&self) -> bool {
        let degrees = &self.degrees;
        let sizes = [self.gpus, self.sequence, self.global_batch, degrees.tensor, degrees.pipeline];
        let model = !self.model_key.is_empty() || self.shape.hidden.is_some();
        model && sizes.iter().all(Option::is_some) && self.step_s.is_some()
    }

    /// The model's name within its family: the key, else the shape, else what is printed.
    pub(super) fn model_name(&self) -> &str {
        let names = [&self.model_key, &self.custom, &self.printed];
        names.into_iter().find(|name| !name.is_empty()).map_or("unnamed", |name| name.as_str())
    }
}

impl Shape {
    fn read(text: &str) -> Self {
        let mut shape = Self::default();
        for word in text.split([' ', ',', ';']) {
            let digits = word.find(|c: char| c.is_ascii_digit()).unwrap_or(word.len());
            let (key, value) = word.split_at(digits);
            let field = match key.trim_end_matches(['=', ':']).to_lowercase().as_str() {
                "l" | "layers" => &mut shape.layers,
                "h" | "hidden" => &mut shape.hidden,
                "a" | "heads" => &mut shape.heads,
                "kv" => &mut shape.kv_heads,
                "ffn" => &mut shape.ffn,
                "e" | "experts" => &mut shape.experts,
                "k" | "topk" => &mut shape.top_k,
                "moeffn" => &mut shape.expert_ffn,
                "v" | "vocab" => &mut shape.vocab,
                _ => continue,
            };
            *field = table::count(value);
        }
        shape
    }
}

/// The first word like `26.04` or `26.04.01` in a text.
fn release(text: &str) -> Option<u64> {
    text.split(|c: char| c.is_whitespace() || c == 'v').find_map(|word| {
        let (year, rest) = word.split_once('.')?;
        let month = rest.get(..2)?;
        let numbers = year.len() == 2 && month.bytes().all(|byte| byte.is_ascii_digit());
        let patch = rest.get(2..).and_then(|patch| patch.strip_prefix('.')?.get(..2)?.parse().ok());
        let (year, month): (u64, u64) = (year.parse().ok()?, month.parse().ok()?);
        (numbers && (1..=12).contains(&month)).then_some(10_000 * year + 100 * month + patch.unwrap_or(0))
    })
}

/// The number that follows `key` as a word of its own in `text`: `TP4`, `tp=4`, `tp4_pp2`, `PP 8`, `seq8k`.
fn spelled(text: &str, key: &str) -> Option<u64> {
    let text = text.to_lowercase();
    text.match_indices(key).find_map(|(at, _)| {
        let before = text[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphabetic()) {
            return None;
        }
        let after = text[at + key.len()..].trim_start_matches(['=', ' ']);
        let digits = after.find(|c: char| !c.is_ascii_digit()).unwrap_or(after.len());
        let times = match after[digits..].strip_prefix('k') {
            Some(rest) if !rest.starts_with(|c: char| c.is_alphanumeric()) => 1024,
            _ => 1,
        };
        let value: u64 = after[..digits].parse().ok()?;
        value.checked_mul(times).filter(|value| *value > 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Table;

    #[test]
    fn a_custom_shape_is_read_key_by_key() {
        let shape = Shape::read("L14 h7168 ffn18432 a128 kv E64 k8 moeffn2048");
        assert_eq!((shape.layers, shape.hidden, shape.ffn), (Some(14), Some(7168), Some(18432)));
        assert_eq!((shape.heads, shape.kv_heads, shape.vocab), (Some(128), None, None));
        assert_eq!((shape.experts, shape.top_k, shape.expert_ffn), (Some(64), Some(8), Some(2048)));
        assert_eq!(Shape::read("L32 h4096 v128k").vocab, Some(131_072));
        assert_eq!(Shape::read("layers=4").layers, Some(4));
        assert_eq!(Shape::read("what? L"), Shape::default());
    }

    #[test]
    fn releases_count_years_months_and_patches() {
        let said = ["x 26.04 NeMo Container", "26.04.01 y", "v25.9", "NeMo v25.05.04", "99.13"].map(release);
        assert_eq!(said, [Some(26_04_00), Some(26_04_01), None, Some(25_05_04), None]);
    }

    #[test]
    fn names_fill_blank_columns_only() {
        let text = "tp,pp,model_as_printed,framework\n2,,x tp4_pp8,Primus TP1 PP4 VPP2 EP8 mbs2 seq8192\n";
        let case = Case::read(Table::parse(text).rows().next().expect("one row"), &Models::default());
        let degrees = case.degrees;
        assert_eq!((degrees.tensor, degrees.pipeline, degrees.virtual_stages), (Some(2), Some(8), Some(2)));
        assert_eq!((degrees.expert, degrees.micro_batch, case.sequence), (Some(8), Some(2), Some(8192)));
    }

    #[test]
    fn units_are_read() {
        let text = "gpu,seq,gbs,step_time_s,tokens_per_s_per_gpu,tflops_per_gpu,mem_max_gib\n\
                    dgx h100,8k,4M tokens,5000ms,1.2k tok/s,0.4 PFLOPS,61440 MiB\n\
                    H100,,4M tokens,1e1,,45%,61 GB\n";
        let table = Table::parse(text);
        let read: Vec<Case> = table.rows().map(|row| Case::read(row, &Models::default())).collect();
        assert_eq!(
            (read[0].gpu.as_str(), read[0].sequence, read[0].global_batch),
            ("H100", Some(8192), Some(512))
        );
        let rates = (read[0].step_s, read[0].tokens_per_s_per_gpu, read[0].tflops_per_gpu);
        assert_eq!(rates, (Some(5.0), Some(1200.0), Some(400.0)));
        assert_eq!((read[0].memory_gib, read[1].memory_gib), (Some(60.0), None));
        assert_eq!((read[1].global_batch, read[1].step_s, read[1].tflops_per_gpu), (None, Some(10.0), None));
        assert_eq!(spelled("x seq8k y", "seq"), Some(8192));
    }
}
