// Processes of histosge. The store is a folder or URL that all tasks write to, not a file that is staged: a task commits
// whole blocks, so one that is repeated computes only what is missing. Slides are read where they are, in parts.

process HISTOSGE_EMBED {
    tag "part ${part}"
    label 'histosge_embed'
    container "${params.container}"
    cpus 4
    memory { 16.GB * task.attempt }
    time { 8.h * task.attempt }
    // Killed, by a walltime or for its memory: again, with more. Anything else stops what has not begun; a slide that
    // failed (exit code 1) is in the log, and the others of its part are in the store.
    errorStrategy { task.exitStatus in [130, 137, 140, 143] ? 'retry' : 'finish' }
    maxRetries 2

    input:
    val part
    val samples
    val store

    output:
    path "embed_${part}.jsonl", emit: log

    script:
    def args = task.ext.args ?: ''
    """
    status=0
    sheet_part.py '${samples}' ${part} ${params.parts} > part.csv || status=\$?
    touch embed_${part}.jsonl
    # 3: fewer slides than parts.
    if test \$status -eq 0; then
        histosge embed part.csv '${store}' --encoder '${params.encoder}' --mpp ${params.mpp} --patch ${params.patch} ${args} --quiet --log embed_${part}.jsonl
    elif test \$status -ne 3; then
        exit \$status
    fi
    """

    stub:
    """
    touch embed_${part}.jsonl
    """
}

process HISTOSGE_VALIDATE {
    label 'histosge_small'
    container "${params.container}"
    cpus 1
    memory 4.GB
    time 1.h

    input:
    val store
    path logs

    output:
    path 'store.txt', emit: report

    script:
    """
    histosge validate '${store}'
    histosge ls '${store}' > store.txt
    """

    stub:
    """
    touch store.txt
    """
}

process HISTOSGE_PREDICT {
    label 'histosge_predict'
    container "${params.container}"
    cpus 4
    memory 16.GB
    time 8.h

    input:
    val store
    val model
    val maps
    path report

    output:
    val maps, emit: maps

    script:
    def args = task.ext.args ?: ''
    """
    histosge predict '${store}' '${model}' '${maps}' --workers ${task.cpus} ${args}
    """

    stub:
    """
    true
    """
}
