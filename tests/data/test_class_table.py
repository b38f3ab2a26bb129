"""Class tables: as spreadsheets save them, the same table or a plain refusal."""

import pytest

from data.class_table import read_table


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("head", ["", "value,name,red,green,blue\r\n", '"Value","Name"\r\n'])
def test_as_spreadsheets_save_it(tmp_path, mark, delimiter, head):
    text = head + '0,road,128,64,128\r\n1,"car",,,\r\n255,,,,\r\n,,,,\r\n\r\n'
    (tmp_path / "t.csv").write_bytes(mark + text.replace(",", delimiter).encode())
    table = read_table(tmp_path / "t.csv")
    assert table.names == ["road", "car"] and table.palette[0] == [128, 64, 128] and table.classes[255] == 255


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("0,road\n".encode("utf-16"), "is saved as UTF-16; save it as CSV in UTF-8"),
        ("0,stra\u00dfe\n".encode("latin1"), "save it as CSV in UTF-8"),
        (b"0,road\n1;car\n", "line 2 is not value,name"),
        (b"0.5,road\n", "line 1 is not value,name"),
        (b"1_0,road\n", "line 1 is not value,name"),
    ],
)
def test_other_tables_are_refused(tmp_path, content, said):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_table(tmp_path / "t.csv")
