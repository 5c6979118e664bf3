//! Fields of a `config.json` by name, each in its range.

use serde_json::Value;

use super::{Config, HuggingFaceError, LARGEST_SIZE, MISSING, field};

impl Config {
    /// The value under any of `names`; `null` counts as absent.
    fn value(&self, names: &[&'static str]) -> Result<Option<&Value>, HuggingFaceError> {
        let mut found: Option<(&'static str, &Value)> = None;
        for name in names {
            let Some(value) = self.fields.get(*name).filter(|value| !value.is_null()) else { continue };
            match found {
                Some((other, first)) if first != value => {
                    let pair = [(other, first.clone()), (*name, value.clone())];
                    return Err(HuggingFaceError::Twice(Box::new(pair)));
                }
                _ => found = found.or(Some((name, value))),
            }
        }
        Ok(found.map(|(_, value)| value))
    }

    /// A size or a count.
    pub(super) fn count(&self, names: &[&'static str]) -> Result<Option<usize>, HuggingFaceError> {
        let Some(value) = self.value(names)? else { return Ok(None) };
        let count = value.as_u64().filter(|count| *count <= LARGEST_SIZE as u64);
        let rule = || format!("is {}; must be a whole number up to {LARGEST_SIZE}", short(value));
        count.map(|count| Some(count as usize)).ok_or_else(|| field(names[0], rule()))
    }

    /// A size or a count that, if it is there, is not 0.
    pub(super) fn at_least_one(&self, names: &[&'static str]) -> Result<Option<usize>, HuggingFaceError> {
        match self.count(names)? {
            Some(0) => Err(field(names[0], format!("is 0; must be between 1 and {LARGEST_SIZE}"))),
            count => Ok(count),
        }
    }

    /// A size or a count that must be there.
    pub(super) fn required(&self, names: &[&'static str]) -> Result<usize, HuggingFaceError> {
        self.at_least_one(names)?.ok_or_else(|| field(names[0], MISSING))
    }

    /// Yes or no.
    pub(super) fn flag(&self, name: &'static str) -> Result<Option<bool>, HuggingFaceError> {
        let Some(value) = self.value(&[name])? else { return Ok(None) };
        let rule = || format!("is {}; must be true or false", short(value));
        value.as_bool().map(Some).ok_or_else(|| field(name, rule()))
    }

    /// A number that is finite and more than 0.
    pub(super) fn positive(&self, name: &'static str) -> Result<Option<f64>, HuggingFaceError> {
        let Some(value) = self.value(&[name])? else { return Ok(None) };
        positive(name, value).map(Some)
    }

    /// The kind of attention of each layer; none where the file does not say.
    pub(super) fn layer_types(&self) -> Result<Vec<&str>, HuggingFaceError> {
        let Some(value) = self.value(&["layer_types"])? else { return Ok(Vec::new()) };
        let kinds = value.as_array().and_then(|kinds| kinds.iter().map(Value::as_str).collect());
        kinds.ok_or_else(|| field("layer_types", "must be a list of strings"))
    }

    /// Which layers of gpt_neo are local: `attention_layers`, or `attention_types`, lists of kinds with how often each is repeated.
    /// Files that say neither name no window.
    pub(super) fn local_layers(&self) -> Result<Vec<bool>, HuggingFaceError> {
        const NAME: &str = "attention_types";
        let local = |kind: &Value| kind.as_str().map(|kind| kind == "local");
        let all = |kinds: &Value| -> Option<Vec<bool>> { kinds.as_array()?.iter().map(local).collect() };
        if let Some(layers) = self.value(&["attention_layers"])? {
            return all(layers).ok_or_else(|| field("attention_layers", "must be a list of strings"));
        }
        let Some(value) = self.value(&[NAME])? else { return Ok(Vec::new()) };
        let layers = self.layers()?;
        let pair = |pair: &Value| {
            let [kinds, times] = pair.as_array()?.as_slice() else { return None };
            let times = times.as_u64().filter(|times| *times <= layers as u64)?;
            Some(all(kinds)?.repeat(times as usize))
        };
        let pairs: Option<Vec<Vec<bool>>> =
            value.as_array().and_then(|pairs| pairs.iter().map(pair).collect());
        let listed =
            pairs.ok_or_else(|| field(NAME, "must be a list of pairs: kinds of layers, how often"))?;
        let listed = listed.concat();
        match listed.len() == layers {
            true => Ok(listed),
            false => Err(field(NAME, format!("names {} layers; there are {layers}", listed.len()))),
        }
    }

    /// Yes or no for each of so many layers, as 1 and 0, where the field is a list.
    pub(super) fn listed(
        &self,
        name: &'static str,
        layers: usize,
    ) -> Result<Option<Vec<bool>>, HuggingFaceError> {
        let Some(Value::Array(values)) = self.value(&[name])? else { return Ok(None) };
        let of = |value: &Value| value.as_u64().filter(|one| *one <= 1).map(|one| one == 1);
        let listed: Option<Vec<bool>> = values.iter().map(of).collect();
        match listed.filter(|listed| listed.len() == layers) {
            Some(listed) => Ok(Some(listed)),
            None => Err(field(
                name,
                format!("must be a number or a list of a 0 or 1 for each of {layers} layers"),
            )),
        }
    }

    /// The layers without experts, in order, where the file lists them.
    pub(super) fn dense_layers(&self) -> Result<Vec<usize>, HuggingFaceError> {
        const NAME: &str = "mlp_only_layers";
        let Some(value) = self.value(&[NAME])? else { return Ok(Vec::new()) };
        let of = |value: &Value| value.as_u64().and_then(|layer| usize::try_from(layer).ok());
        let layers: Option<Vec<usize>> = value.as_array().and_then(|layers| layers.iter().map(of).collect());
        let mut layers = layers.ok_or_else(|| field(NAME, "must be a list of layers"))?;
        layers.sort_unstable();
        layers.dedup();
        Ok(layers)
    }
}

/// `value` as a number that is finite and more than 0.
pub(super) fn positive(name: &'static str, value: &Value) -> Result<f64, HuggingFaceError> {
    let number = value.as_f64().filter(|number| number.is_finite() && *number > 0.0);
    number.ok_or_else(|| field(name, format!("is {}; must be a number above 0", short(value))))
}

/// A value as a message shows it.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
