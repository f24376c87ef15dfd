//! Columns for people: aligned by their longest cell, two spaces apart, no lines drawn.

/// A row of a table.
pub(super) type Row = Vec<String>;

/// The rows under their headings. Control characters of a cell are left out: what a server says must not steer a
/// terminal.
pub(super) fn table(headings: &[&str], rows: &[Row]) -> String {
    let clean = |cell: &str| cell.chars().filter(|c| !c.is_control()).collect::<String>();
    let mut lines: Vec<Row> = vec![headings.iter().map(|heading| (*heading).to_owned()).collect()];
    lines.extend(rows.iter().map(|row| row.iter().map(|cell| clean(cell)).collect()));
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let line = |cells: &Row| {
        let padded: Vec<String> =
            cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}", width = *width)).collect();
        padded.join("  ").trim_end().to_owned() + "\n"
    };
    lines.iter().map(line).collect()
}

/// Names and values, one below the other.
pub(super) fn pairs(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or_default() + 1;
    let clean = |cell: &str| cell.chars().filter(|c| !c.is_control()).collect::<String>();
    rows.iter().map(|(name, value)| format!("{:<width$}  {}\n", format!("{name}:"), clean(value))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_longest_cell_and_lines_end_where_text_does() {
        let rows = [vec!["vm-1".to_owned(), "ready".to_owned()], vec!["a\u{1b}[2J".to_owned(), String::new()]];
        assert_eq!(table(&["NAME", "STATE"], &rows), "NAME  STATE\nvm-1  ready\na[2J\n");
        assert_eq!(pairs(&[("state", "ready".into()), ("size", "1 GiB".into())]), "state:  ready\nsize:   1 GiB\n");
    }
}
