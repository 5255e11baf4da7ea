CREATE FUNCTION outbox_publish(
    aggregatetype text, aggregateid text, payload json, headers jsonb DEFAULT NULL, id uuid DEFAULT gen_random_uuid()
) RETURNS uuid LANGUAGE plpgsql AS $$
BEGIN
    IF aggregatetype IS NULL OR aggregateid IS NULL OR id IS NULL THEN
        RAISE not_null_violation USING MESSAGE = 'aggregatetype, aggregateid and id must not be NULL';
    ELSIF length(aggregatetype) > 255 OR length(aggregateid) > 255 THEN
        RAISE string_data_right_truncation USING MESSAGE = 'aggregatetype and aggregateid have at most 255 characters';
    ELSIF jsonb_typeof(headers) <> 'object' THEN
        RAISE invalid_parameter_value USING MESSAGE = 'headers must be an object';
    END IF;
    PERFORM pg_logical_emit_message(true, 'jetstream_outbox', concat(
        '{"id":"', id, '","aggregatetype":', to_json(aggregatetype), ',"aggregateid":', to_json(aggregateid),
        ',"headers":', coalesce(headers::text, 'null'), ',"payload":', coalesce(payload::text, 'null'), '}'));
    RETURN id;
END $$;
