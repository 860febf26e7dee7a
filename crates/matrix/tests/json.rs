//! What programs read. The fields are those of docs/matrix.md; one that goes, or means something else, is a new schema.

use ringfence_matrix::record::Table;
use ringfence_matrix::{Genuine, Matrix};

#[test]
fn a_cell_of_each_kind() {
    for (name, select) in [
        ("translated", "platform=x86-iommu driver=new device=new-emulated"),
        ("corrupts", "platform=xen driver=old device=old-emulated"),
        ("refused", "platform=ppc-proposed driver=new device=new-physical"),
        ("otherwise", "platform=x86-iommu driver=old device=new-emulated"),
        ("unsure", "platform=arm64 driver=old device=old-physical"),
    ] {
        let matrix = Matrix::run(&select.parse().unwrap(), &Genuine);
        insta::assert_snapshot!(name, serde_json::to_string_pretty(&matrix.table()).unwrap());
    }
}

#[test]
fn what_is_written_can_be_read_again() {
    let table = Matrix::run(&Default::default(), &Genuine).table();
    let read: Table = serde_json::from_str(&serde_json::to_string(&table).unwrap()).unwrap();
    assert_eq!(read, table);
}
