"""The sample sheet: a wrong one ends in a sentence that names the line; folders and globs stand for their files."""

import gzip
import os
from pathlib import Path

import pytest
from made_up import write_fasta

from esmflow.inputs.sheet import FASTA_SUFFIXES, InputError, InputFile, expand, output_names, read_samples


def text(path, content: str | bytes):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def sheet_refusal(path: Path | str, formats: tuple[str, ...] = ()) -> str:
    with pytest.raises(InputError) as error:
        read_samples(str(path), formats)
    return str(error.value)


@pytest.fixture
def sheet(tmp_path, monkeypatch):
    """Writes a sample sheet in a working directory that has a.fasta, b.fasta and sub/a.faa.gz."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.fasta", "b.fasta", "sub/a.faa.gz"):
        write_fasta(Path(name), [("p", "MKV")])

    def sheet(text: str | bytes, name: str = "samples.tsv") -> str:
        Path(name).write_bytes(text.encode() if isinstance(text, str) else text)
        return name

    return sheet


def test_a_sheet_gives_its_files_in_order(sheet):
    path = sheet("sample\tfasta\nsecond\tb.fasta\nfirst\ta.fasta\n")
    assert read_samples(path, ["pt"]) == [InputFile("second", "b.fasta"), InputFile("first", "a.fasta")]


def test_more_columns_blank_lines_comments_and_windows_line_ends_are_fine(sheet):
    path = sheet("\ufeffnote\tsample\tfasta\r\nmine\tx\ta.fasta\r\n\r\n\t#y\tnone.fasta\r\n\t z \t b.fasta \r\n")
    assert read_samples(path) == [
        InputFile("x", "a.fasta", (("note", "mine"),)),
        InputFile("z", "b.fasta", (("note", ""),)),
    ]


def test_a_glob_in_a_sheet_gives_every_match_under_one_sample(sheet):
    path = sheet("sample\tfasta\nx\t*.fasta\ny\t**/*.gz\n")
    assert read_samples(path) == [
        InputFile("x", "a.fasta"),
        InputFile("x", "b.fasta"),
        InputFile("y", "sub/a.faa.gz"),
    ]


def test_a_glob_instead_of_a_sheet_names_samples_by_their_files(sheet):
    assert read_samples("*.fasta") == [InputFile("a", "a.fasta"), InputFile("b", "b.fasta")]
    assert read_samples("s*/*.gz") == [InputFile("a", "sub/a.faa.gz")]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(sheet):
    write_fasta(Path("x[1].fasta"), [("p", "MKV")])
    assert read_samples(sheet("sample\tfasta\nx\tx[1].fasta\n")) == [InputFile("x", "x[1].fasta")]


def test_a_glob_that_matches_nothing_is_refused(sheet):
    assert sheet_refusal("none/*.faa") == "samples: none/*.faa matches no file"
    path = sheet("sample\tfasta\nx\ta.fasta\ny\t*.faa\n")
    assert sheet_refusal(path) == "samples.tsv, line 3: fasta: *.faa matches no file"


def test_a_sheet_that_is_not_there_is_refused(sheet):
    message = sheet_refusal("none.tsv")
    assert message.startswith("samples: none.tsv cannot be read (No such file or directory)")
    assert message.endswith("give a TSV file with the columns sample and fasta, or a glob")


def test_a_folder_is_no_sheet(sheet):
    assert sheet_refusal("sub").startswith("samples: sub cannot be read")


def test_a_sheet_that_is_no_utf8_text_is_refused(sheet):
    excel = sheet("sample\tfasta\nx\ta.fasta\n".encode("utf-16"))
    assert sheet_refusal(excel).startswith("samples: samples.tsv is not a text file in UTF-8")


@pytest.mark.parametrize(
    ("text", "found"),
    [("sample,fasta\nx,a.fasta\n", "sample,fasta"), ("name\tfasta\nx\ta.fasta\n", "name, fasta"), ("", "none")],
)
def test_a_sheet_without_the_columns_is_refused_and_told_what_it_has(sheet, text, found):
    assert sheet_refusal(sheet(text)) == (
        f"samples.tsv: needs the tab-separated columns sample and fasta; its first line has: {found}"
    )


@pytest.mark.parametrize("column", ["fasta", "sample", "host"])
def test_a_sheet_with_a_column_twice_is_refused(sheet, column):
    path = sheet(f"sample\tfasta\thost\t{column}\na\ta.fasta\tx\tb.fasta\n")
    assert sheet_refusal(path) == f"{path}: its column {column} is there twice; rename or remove one"


def test_a_sheet_without_samples_is_refused(sheet):
    assert sheet_refusal(sheet("sample\tfasta\n\n")) == "samples.tsv: lists no sample"


@pytest.mark.parametrize("line", ["x\t", "x", "\ta.fasta"])
def test_a_line_that_is_not_filled_in_is_refused_by_its_number(sheet, line):
    path = sheet(f"sample\tfasta\ny\tb.fasta\n{line}\n")
    assert sheet_refusal(path) == "samples.tsv, line 3: sample and fasta must both be filled in"


def test_a_fasta_file_that_does_not_exist_is_named(sheet):
    path = sheet("sample\tfasta\nx\ta.fasta\ny\tnone.fasta\nz\tnor.fasta\n")
    assert sheet_refusal(path) == "samples.tsv: fasta: none.fasta does not exist (and 1 more); correct the path"


def test_a_sample_listed_twice_is_refused(sheet):
    path = sheet("sample\tfasta\nx\ta.fasta\nx\tb.fasta\n")
    assert sheet_refusal(path) == "samples.tsv: sample x is listed twice; give each its own name"


@pytest.mark.parametrize("again", ["a.fasta", "./a.fasta", "sub/../a.fasta", "[a]*.fasta"])
def test_a_file_listed_twice_is_refused_however_it_is_written(sheet, again):
    path = sheet(f"sample\tfasta\nx\ta.fasta\ny\t{again}\n")
    assert sheet_refusal(path) == "samples.tsv: the file a.fasta is listed twice; remove one"


def test_a_sheet_with_braces_in_its_name_is_a_sheet_like_any_other(sheet):
    path = sheet("sample\tfasta\nx\ta.fasta\nx\tb.fasta\n", "{run}.tsv")
    assert sheet_refusal(path) == "{run}.tsv: sample x is listed twice; give each its own name"


def test_two_files_with_one_stem_are_named_by_their_samples(sheet):
    path = sheet("sample\tfasta\nx\ta.fasta\ny/z\tsub/a.faa.gz\nother\tb.fasta\n")
    files = read_samples(path, ("pt",))
    assert output_names(files) == {"a.fasta": "x", "sub/a.faa.gz": "y%2Fz", "b.fasta": "b"}


@pytest.mark.parametrize(
    ("lines", "places", "name"),
    [
        ("x\ta.fasta\na\tsub/a.faa.gz", "a.fasta and sub/a.faa.gz", "a"),
        ("a\ta.fasta\nx\tsub/a.faa.gz", "sub/a.faa.gz and a.fasta", "a"),
        ("b\ta.fasta\nx\tsub/a.faa.gz\ny\tb.fasta", "b.fasta and a.fasta", "b"),
    ],
)
def test_two_files_of_one_name_are_refused_where_both_would_be_one_pt_file(sheet, lines, places, name):
    path = sheet(f"sample\tfasta\n{lines}\n")
    assert sheet_refusal(path, ("pt",)) == (
        f"samples.tsv: {places} would both be written under the name {name}; list each by itself, with a sample name "
        "of its own, rename one, or leave pt out of formats"
    )
    assert len(read_samples(path)) == lines.count("\n") + 1


def test_files_that_one_glob_names_have_no_sample_names_of_their_own(sheet):
    sheet("")
    with pytest.raises(InputError, match=r"sub/a\.faa\.gz and a\.fasta would both be written under the name a;"):
        read_samples("**/a.*", ("pt",))


# Folders and globs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("b.faa", "a.fasta.gz", "C.FA", "d.pep.zst", ".hidden.fasta", "notes.txt", "t.tsv", "e.fasta.tmp")
    os.mkdir("proteins")
    for name in names:
        text(tmp_path / "proteins" / name, b"")
    os.mkdir("proteins/deeper.fasta")
    return "proteins"


def test_a_folder_stands_for_its_fasta_files_in_order(folder):
    assert expand(folder) == [f"proteins/{name}" for name in ("C.FA", "a.fasta.gz", "b.faa", "d.pep.zst")]


def test_a_folder_in_the_sheet_is_one_sample_of_many_files(folder, tmp_path):
    sheet = text(tmp_path / "samples.tsv", "sample\tfasta\nx\tproteins/\ny\tproteins/t.ts?\n")
    text(tmp_path / "proteins" / "t.tsv", "id\tsequence\n")
    names = ("C.FA", "a.fasta.gz", "b.faa", "d.pep.zst")
    assert read_samples(str(sheet)) == [
        *(InputFile("x", f"proteins/{name}") for name in names),
        InputFile("y", "proteins/t.tsv"),
    ]


def test_a_folder_without_fasta_files_is_a_sentence(folder, tmp_path):
    os.mkdir("empty")
    sheet = text(tmp_path / "samples.tsv", "sample\tfasta\nx\tempty\n")
    with pytest.raises(InputError) as refusal:
        read_samples(str(sheet))
    assert str(refusal.value).startswith(f"{sheet}, line 2: fasta: the folder empty holds no FASTA file")
    assert all(suffix in str(refusal.value) for suffix in FASTA_SUFFIXES)


def test_a_glob_that_matches_nothing_is_a_sentence(folder):
    with pytest.raises(InputError, match=r"proteins/\*\.xyz matches no file"):
        expand("proteins/*.xyz")


def test_a_quote_that_is_never_closed_costs_no_sample(sheet):
    path = sheet('note\tsample\tfasta\n"Candidatus\tx\ta.fasta\nnone\ty\tb.fasta\n"quoted"\tz\t"sub/a.faa.gz"\n')
    assert [(file.sample, file.path) for file in read_samples(path)] == [
        ("x", "a.fasta"),
        ("y", "b.fasta"),
        ("z", "sub/a.faa.gz"),
    ]


def test_a_line_with_more_cells_than_the_head_is_a_sample_like_any_other(sheet):
    assert read_samples(sheet("sample\tfasta\nx\ta.fasta\tmore\n")) == [InputFile("x", "a.fasta")]


# Names and paths


def paths(samples) -> list[str]:
    return [file.path for file in read_samples(str(samples))]


def test_a_path_may_be_relative_to_the_sheet_and_the_working_directory_goes_first(sheet):
    os.mkdir("project")
    os.mkdir("project/sub")
    write_fasta(Path("project/own.fasta"), [("p", "MKV")])
    write_fasta(Path("project/a.fasta"), [("p", "MKV")])
    write_fasta(Path("project/sub/x1.fa"), [("p", "MKV")])
    text = "sample\tfasta\nown\town.fasta\na\ta.fasta\nglob\tsub/*.fa\n"
    assert paths(sheet(text, "project/samples.tsv")) == ["project/own.fasta", "a.fasta", "project/sub/x1.fa"]


def test_a_tilde_is_the_home(sheet, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_fasta(tmp_path / "home" / "h.fasta", [("p", "MKV")])
    sheet("sample\tfasta\nx\t~/h.fasta\n", "home/s.tsv")
    for samples in ("home/s.tsv", "~/s.tsv", "~/*.fasta"):
        assert paths(samples) == [str(tmp_path / "home" / "h.fasta")]


@pytest.mark.parametrize("name", ["x{1}.fasta", "{sample}.fasta", "x{{a,b}}.fasta", "x<results>.fasta", "{d}/a.fasta"])
def test_names_that_snakemake_would_change_are_named_in_a_sentence(sheet, name):
    write_fasta(Path(name), [("p", "MKV")])
    assert sheet_refusal(sheet(f"sample\tfasta\nx\t{name}\n")) == (
        f"samples.tsv, line 2: fasta: the name {name} has braces or angle brackets around a word, which Snakemake "
        "takes for a wildcard; rename it, or link to it by another name"
    )


def test_names_with_braces_percent_signs_spaces_and_other_alphabets_are_names(sheet):
    names = [
        "x{}.fasta",
        "x{a b}.fasta",
        "<.fasta",
        "100%.fasta",
        "with space.fasta",
        "蛋白質.fasta",
        "#1.fasta",
        "-n.fasta",
        "~.fasta",
    ]
    for name in names:
        write_fasta(Path(name), [("p", "MKV")])
    lines = "".join(f"s{i}\t{name}\n" for i, name in enumerate(names))
    assert paths(sheet("sample\tfasta\n" + lines)) == names


def test_a_name_that_is_not_utf8_is_named_in_a_sentence(sheet):
    with open(b"caf\xe9.fasta", "wb") as handle:
        handle.write(b">a\nMKV\n")
    for samples in (sheet("sample\tfasta\nx\t*.fasta\n"), "c*.fasta"):
        assert sheet_refusal(samples).endswith(
            r"the name caf\xe9.fasta is not UTF-8; rename it, or link to it by another name"
        )


def test_a_glob_that_meets_folders_takes_files_and_of_folders_alone_their_files(sheet):
    for folder in ("GCF_1", "GCF_2", "GCF_3"):
        os.mkdir(folder)
    write_fasta(Path("GCF_1/protein.faa"), [("p", "MKV")])
    write_fasta(Path("GCF_2/protein.faa"), [("p", "LAG")])
    assert paths(sheet("sample\tfasta\nx\tGCF_*\n")) == ["GCF_1/protein.faa", "GCF_2/protein.faa"]
    assert paths(sheet("sample\tfasta\nx\t[Ga]*\n")) == ["a.fasta"]
    assert sheet_refusal(sheet("sample\tfasta\nx\tGCF_[3]\n")).endswith(
        "matches no file and no folder with FASTA files"
    )


def test_a_name_in_a_folder_that_looks_like_a_glob_is_found(sheet):
    write_fasta(Path("x[1]/y[2].fasta"), [("p", "MKV")])
    assert paths(sheet("sample\tfasta\nx\tx[1]/y[2].fasta\ny\tx[1]\n".replace("\ny\tx[1]", ""))) == ["x[1]/y[2].fasta"]


def test_what_exists_and_is_no_file_is_said_to_be_what_it_is(sheet):
    os.symlink("loop", "loop")
    os.symlink("nowhere.fasta", "dangling")
    os.mkfifo("pipe")
    os.symlink("/dev/null", "device")
    said = {
        "loop": "is a loop of symbolic links",
        "dangling": "is a symbolic link to nowhere.fasta, which does not exist",
        "pipe": "is no file but a pipe, socket or device: write it to a file first",
        "device": "is no file but a pipe, socket or device: write it to a file first",
        "a.fasta/x": "cannot be read (Not a directory)",
        "n" * 300: "cannot be read (File name too long)",
    }
    for name, why in said.items():
        assert (
            sheet_refusal(sheet(f"sample\tfasta\nx\t{name}\n")) == f"samples.tsv: fasta: {name} {why}; correct the path"
        )


def test_what_is_no_file_is_not_waited_for_as_a_sheet(sheet):
    os.mkfifo("pipe.tsv")
    assert sheet_refusal("pipe.tsv") == (
        "samples: pipe.tsv cannot be read (it is no file but a pipe, socket or device: write it to a file first); "
        "give a TSV file with the columns sample and fasta, or a glob"
    )
    assert "does not exist: it is an address; download" in sheet_refusal(
        sheet("sample\tfasta\nx\thttps://x.org/p.fa\n")
    )


def test_nul_in_a_sheet_is_a_sentence(sheet):
    assert sheet_refusal(sheet("sample\tfasta\nx\ta\0b.fasta\n")).startswith(
        "samples.tsv, line 2: fasta: 'a\\x00b.fasta' has a NUL"
    )
    assert "cannot be read" in sheet_refusal("a\0b.tsv")


@pytest.mark.parametrize("samples", ["a.fasta", "c.faa.gz"])
def test_a_fasta_file_instead_of_a_sheet_is_one_sample(sheet, samples):
    Path("c.faa.gz").write_bytes(gzip.compress(b">p\nMKV\n"))
    assert read_samples(samples) == [InputFile(samples[0], samples)]


def test_a_table_of_proteins_instead_of_a_sheet_is_one_sample(sheet):
    assert read_samples(sheet("id\tsequence\na\tMKV\n", "proteins.tsv")) == [InputFile("proteins", "proteins.tsv")]


def test_a_sheet_as_a_spreadsheet_saves_it_is_named(sheet):
    assert sheet_refusal(sheet(b"\xd0\xcf\x11\xe0" + bytes(600))) == (
        "samples: samples.tsv is not a text file in UTF-8, but an Excel or other Office document; "
        "save it as tab-separated UTF-8 text"
    )


def test_further_columns_are_annotations_of_every_file_of_the_line(sheet):
    path = sheet("sample\ttissue\tfasta\thost\t\nx\tgut\t*.fasta\tmouse\tignored\ny\t\tsub\t\t\n")
    assert [(file.path, file.annotations) for file in read_samples(path)] == [
        ("a.fasta", (("tissue", "gut"), ("host", "mouse"))),
        ("b.fasta", (("tissue", "gut"), ("host", "mouse"))),
        ("sub/a.faa.gz", (("tissue", ""), ("host", ""))),
    ]
