//! Figures, and the table that shows them.

use std::time::Duration;

/// The value below which `percent` of all lie.
pub fn percentile(values: &[Duration], percent: usize) -> Duration {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]
}

pub fn median(values: &[Duration]) -> Duration {
    percentile(values, 50)
}

/// The median of ratios; each pairs what was measured side by side, so that a machine whose speed
/// drifts does not move it.
pub fn median_ratio(pairs: impl IntoIterator<Item = (Duration, Duration)>) -> f64 {
    let ratios = pairs.into_iter().map(|(ours, floor)| ours.as_secs_f64() / floor.as_secs_f64());
    let mut ratios: Vec<f64> = ratios.collect();
    ratios.sort_by(f64::total_cmp);
    ratios[ratios.len() / 2]
}

pub fn micros(time: Duration) -> String {
    format!("{:.1} us", time.as_secs_f64() * 1e6)
}

pub fn millis(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

/// `goal 1.5: met`.
pub fn verdict(value: f64, goal: f64) -> String {
    let word = if value <= goal { "met" } else { "MISSED" };
    format!("goal {goal}: {word}")
}

/// Says what is measured and how busy the machine is: others at work show in every figure.
pub fn heading(text: &str) {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or("?").to_owned();
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    println!("{text}");
    println!("({processors} processors, load average {load} at the start)");
}

/// Prints rows with their columns aligned: the first to the left, the others to the right.
pub fn table(rows: &[Vec<String>]) {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column| rows.iter().filter_map(|row| row.get(column)).map(String::len).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    for row in rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            line += &match column {
                0 => format!("  {cell:<width$}"),
                _ => format!("  {cell:>width$}"),
            };
        }
        println!("{}", line.trim_end());
    }
}

/// A row of a table.
#[macro_export]
macro_rules! row {
    ($($cell:expr),* $(,)?) => { vec![$($cell.to_string()),*] };
}
